// sessions.js - sessions on the server as a tree of branches.
//
// A session's metadata says that it is the playground's, its name, and which session it was forked
// from: so the tree outlives a reload and is the same in every tab.

import { api } from "./api.js";

const PAGE = 100, MAX_PAGES = 5, IDLE_S = 7 * 86400;

const path = (id, more = "") => `v1/sessions/${encodeURIComponent(id)}${more}`;

export const retrieve = (id) => api.json(path(id));
export const snapshots = async (id) => (await api.json(path(id, "/snapshots"))).data;

/** A session as the page knows it: where it has moved on, nothing is done (412). */
const known = ({ version }) => ({ "If-Match": `"${version}"` });

export const remove = (s) => api.json(path(s.id), { method: "DELETE", headers: known(s) });
export const rollback = (s, snapshot) => api.json(path(s.id, "/rollback"), {
  json: snapshot === undefined ? {} : { snapshot }, headers: known(s),
});
export const snapshot = (s, name) => api.json(path(s.id, "/snapshots"), { json: { name }, headers: known(s) });
export const exported = async (s) => (await api.send(path(s.id, "/state"), { headers: known(s) })).blob();
export const imported = (id, bytes) => api.json(path(id, "/state"), {
  method: "PUT", body: bytes, headers: { "Content-Type": "application/octet-stream" },
});

const isOurs = (s) => s.metadata.playground === "1";
const parentOf = (s) => s.metadata.parent ?? "";
export const nameOf = (s) => s.metadata.name || s.id.slice(0, 13);

/** The first words of a text, for a name: metadata takes 512 bytes. */
const clipped = (text) => {
  const words = text.trim().replace(/\s+/g, " ");
  return words.length > 40 ? `${[...words].slice(0, 39).join("")}…` : words;
};

export const create = (name) => api.json("v1/sessions", { json: { metadata: { playground: "1", name: clipped(name) }, idle_ttl: IDLE_S } });

/** A branch that goes on from where a session is. */
export function fork(parent, sessions) {
  const k = sessions.filter((s) => parentOf(s) === parent.id).length + 1;
  const above = /^Branch ([\d.]+)$/.exec(nameOf(parent));
  const metadata = { playground: "1", parent: parent.id, name: `Branch ${above ? `${above[1]}.` : ""}${k}`, at: String(parent.position) };
  return api.json("v1/sessions", { json: { metadata, idle_ttl: IDLE_S, from: { session: parent.id } } });
}

/** The playground's sessions of this API key, oldest first. */
export async function list() {
  const found = [];
  for (let page = 0, after = ""; page < MAX_PAGES; page++) {
    const reply = await api.json(`v1/sessions?limit=${PAGE}${after && `&after=${encodeURIComponent(after)}`}`);
    found.push(...reply.data.filter(isOurs));
    after = reply.last_id;
    if (!reply.has_more) break;
  }
  return found.reverse();
}

function branch(s, current, pick) {
  const button = document.createElement("button"), name = document.createElement("b"), at = document.createElement("span");
  button.type = "button";
  button.className = "branch";
  button.dataset.session = s.id;
  if (s.id === current) button.setAttribute("aria-current", "true");
  name.textContent = nameOf(s);
  at.textContent = `${s.metadata.at !== undefined ? `${Number(s.metadata.at).toLocaleString("en")} → ` : ""}${s.position.toLocaleString("en")}`;
  button.title = s.id;
  button.append(name, at);
  button.addEventListener("click", () => pick(s.id));
  return button;
}

function subtree(s, sessions, current, pick) {
  const item = document.createElement("li"), children = sessions.filter((c) => parentOf(c) === s.id);
  item.append(branch(s, current, pick));
  if (children.length) {
    const below = document.createElement("ul");
    below.append(...children.map((c) => subtree(c, sessions, current, pick)));
    item.append(below);
  }
  return item;
}

/** The branches of the current session's family, and all others folded away. */
export function renderTree(container, sessions, current, pick) {
  const byId = new Map(sessions.map((s) => [s.id, s]));
  const rootOf = (s) => {
    while (byId.has(parentOf(s))) s = byId.get(parentOf(s));
    return s;
  };
  const mine = byId.has(current) ? rootOf(byId.get(current)) : null;
  const roots = sessions.filter((s) => !byId.has(parentOf(s)) && s !== mine).reverse();
  const trees = (these, label) => {
    const ul = document.createElement("ul");
    ul.className = "tree";
    ul.setAttribute("aria-label", label);
    ul.append(...these.map((s) => subtree(s, sessions, current, pick)));
    return ul;
  };
  const parts = [];
  if (mine) parts.push(trees([mine], "Branches of this session"));
  if (roots.length) {
    const box = document.createElement("details"), summary = document.createElement("summary");
    box.id = "others";
    box.open = container.querySelector("#others")?.open ?? !mine;
    summary.textContent = `${roots.length} other session${roots.length > 1 ? "s" : ""} on this server`;
    box.append(summary, trees(roots, "Other sessions"));
    parts.push(box);
  }
  if (!parts.length) {
    const note = document.createElement("p");
    note.className = "note";
    note.textContent = "A fork goes on from where a session is, and both go their own ways.";
    parts.push(note);
  }
  container.replaceChildren(...parts);
}
