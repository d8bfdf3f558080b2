// app.js - the page begins here: the bar, the connection, and what each control does.

import { api } from "./api.js";
import * as branches from "./branches.js";
import { act, toggleKey, togglePanel } from "./problems.js";
import { openSampling, resetSampling } from "./sampling.js";
import * as sessions from "./sessions.js";
import * as store from "./store.js";
import { resumePending, send, stop } from "./talk.js";
import { $, showMode, showSession, showTurns, state } from "./view.js";

const THEMES = ["system", "light", "dark"];

function showTheme(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").textContent = `Colours: ${name}`;
}

/** The models, and whether there is a chat template: a model without one refuses messages. */
async function connect() {
  const { data } = await api.json("v1/models");
  $("model").replaceChildren(...data.map((m) => new Option(m.id, m.id)));
  state.model = data[0]?.id ?? "";
  try {
    await api.json("tokenize", { json: { messages: [{ role: "user", content: "x" }] } });
    state.canChat = true;
  } catch (e) {
    if (e.status !== 400) throw e;
    state.canChat = false;
  }
  $("mode-chat").disabled = !state.canChat;
  $(state.canChat ? "mode-chat" : "mode-completion").checked = true;
  $("mode-note").textContent = state.canChat ? "" : "This model has no chat template that the server knows: it completes text.";
  showMode();
  state.all = await sessions.list();
  const id = decodeURIComponent(location.hash.slice(1));
  if (id) await branches.open(id);
  showSession();
  showTurns();
}

async function begin() {
  await act(connect);
  await resumePending();
}

// A session that was used elsewhere while this tab was behind others.
async function look() {
  if (document.visibilityState !== "visible" || state.busy || !state.session) return;
  const now = await sessions.retrieve(state.session.id).catch(() => null);
  if (now && !state.busy && now.id === state.session?.id && now.version !== state.session.version) await act(branches.refresh);
}

function listen() {
  $("composer").addEventListener("submit", (e) => { e.preventDefault(); send(); });
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", () => act(branches.startAnew));
  $("fork").addEventListener("click", () => act(branches.fork));
  $("export").addEventListener("click", () => act(branches.exportState));
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", (e) => {
    const [file] = e.target.files;
    e.target.value = "";
    if (file) act(() => branches.importState(file));
  });
  $("refresh").addEventListener("click", () => act(branches.refresh));
  $("delete").addEventListener("click", () => act(branches.deleteSession));
  $("snapshot-form").addEventListener("submit", (e) => { e.preventDefault(); if (!$("snapshot-make").disabled) act(branches.makeSnapshot); });
  $("sampling-reset").addEventListener("click", resetSampling);
  $("with-tint").addEventListener("change", (e) => $("log").classList.toggle("tint", e.target.checked));
  $("model").addEventListener("change", (e) => { state.model = e.target.value; });
  $("panel-toggle").addEventListener("click", () => togglePanel());
  $("key-toggle").addEventListener("click", () => toggleKey());
  $("key-form").addEventListener("submit", (e) => {
    e.preventDefault();
    api.key = $("key").value.trim();
    store.keepKey($("key-keep").checked ? api.key : "");
    toggleKey(false);
    begin();
  });
  $("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(store.theme()) + 1) % THEMES.length];
    store.keepTheme(next);
    showTheme(next);
  });
  for (const e of document.querySelectorAll("input[name=mode]")) e.addEventListener("change", showMode);
  document.addEventListener("keydown", (e) => {
    if (e.key === "Enter" && (e.ctrlKey || e.metaKey) && !$("confirm").open) { e.preventDefault(); send(); }
    if (e.key === "Escape" && state.generation) { e.preventDefault(); stop(); }
  });
  document.addEventListener("visibilitychange", look);
  addEventListener("hashchange", () => {
    const id = decodeURIComponent(location.hash.slice(1));
    if (id && id !== state.session?.id) act(() => branches.open(id));
  });
}

showTheme(store.theme());
openSampling();
listen();
api.key = store.keptKey();
$("key").value = api.key;
$("key-keep").checked = Boolean(api.key);
begin();
