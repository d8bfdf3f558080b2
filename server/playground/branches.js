// branches.js - what is done with sessions: open, fork, go back, keep, carry away, delete.

import * as sessions from "./sessions.js";
import * as store from "./store.js";
import { $, bytes, pointsOf, say, showSession, showSnapshots, showTurns, state } from "./view.js";

export function remember() {
  const { session, text } = state;
  if (session) store.keepText(session.id, { ...text, version: session.version, turns: text.turns.filter(isApplied) });
}

const isApplied = (t) => t.state === "done" || t.state === "gap";

export function dropUnapplied() {
  state.text.turns = state.text.turns.filter(isApplied);
}

/** The server's word on the session. */
export function take(session) {
  state.session = session;
  const known = state.all.findIndex((s) => s.id === session.id);
  if (known >= 0) state.all[known] = session;
  else if (session.metadata.playground === "1") state.all.push(session);
}

const endOf = (turn) => turn.end ?? turn.to;

/** What the session did without this tab becomes a gap behind the turns that are surely older.
 *  unsure: it was changed more than once, so even those may have been taken back. */
function bridge(unsure = false) {
  const { turns } = state.text, { position } = state.session;
  while (turns.length && endOf(turns.at(-1)) > position) turns.pop();
  const end = turns.length ? endOf(turns.at(-1)) : 0;
  if (position === end && !(unsure && turns.length)) return;
  turns.push({ state: "gap", from: end, to: position, unsure: unsure && turns.length > 0 });
  state.text.undo = false;
}

export async function refresh() {
  if (state.session) {
    const before = state.session.version;
    take(await sessions.retrieve(state.session.id));
    dropUnapplied();
    const moved = state.session.version - before;
    if (moved) {
      state.text.undo = false;
      bridge(moved !== 1);
    }
    remember();
  }
  state.all = await sessions.list();
  showSnapshots(state.session ? await sessions.snapshots(state.session.id) : []);
  showTurns();
  showSession();
}

export async function open(id) {
  const session = await sessions.retrieve(id);
  take(session);
  state.text = store.loadText(id);
  bridge(![undefined, session.version, session.version - 1].includes(state.text.version));
  state.text.undo &&= state.text.version === session.version;
  history.replaceState(null, "", `#${id}`);
  showSnapshots(await sessions.snapshots(id));
  showTurns();
  showSession();
  say(`${sessions.nameOf(session)}, position ${session.position}`);
}

export async function startAnew() {
  state.session = null;
  state.text = { turns: [], marks: {}, undo: false };
  history.replaceState(null, "", location.pathname + location.search);
  showSnapshots([]);
  showTurns();
  showSession();
  $("prompt").focus();
}

export async function fork() {
  const child = await sessions.fork(state.session, state.all);
  const { turns } = state.text;
  store.keepText(child.id, { turns: turns.filter(isApplied), marks: {}, undo: false, version: child.version });
  const tokens = turns.map((t) => t.tokens);
  state.points.set(child.id, [...pointsOf(state.session.id)]);
  await refresh();
  await open(child.id);
  state.text.turns.forEach((t, i) => { t.tokens ??= tokens[i]; });
  showTurns();
}

export async function rollBackTo(name) {
  take(await sessions.rollback(state.session, name));
  dropUnapplied();
  const { marks } = state.text;
  state.text.turns = [...(Object.hasOwn(marks, name) ? marks[name] : state.text.turns)];
  state.text.undo = false;
  bridge(!Object.hasOwn(marks, name)); // one that was kept elsewhere: with which words is not known
  remember();
  showTurns();
  showSession();
  say(`Rolled back to ${name}, position ${state.session.position}`);
}

export async function makeSnapshot() {
  const name = $("snapshot-name").value.trim() || `at ${state.session.position}`;
  await sessions.snapshot(state.session, name);
  state.text.marks[name] = state.text.turns.filter(isApplied);
  remember();
  $("snapshot-name").value = "";
  showSnapshots(await sessions.snapshots(state.session.id));
  take(await sessions.retrieve(state.session.id));
  showSession();
  say(`Snapshot ${name} kept`);
}

export async function exportState() {
  const blob = await sessions.exported(state.session), link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `latte-${state.session.id.slice(5, 13)}-${state.session.position}.state`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  say(`Exported ${bytes(blob.size)}`);
}

/** A file becomes a session of its own, so that nothing is replaced. */
export async function importState(file) {
  const made = await sessions.create(file.name);
  try {
    await sessions.imported(made.id, file);
  } catch (e) {
    await sessions.remove(made).catch(() => {});
    throw e;
  }
  state.all = await sessions.list();
  await open(made.id);
}

function confirmed(text) {
  const dialog = $("confirm");
  $("confirm-text").textContent = text;
  dialog.returnValue = "no";
  dialog.showModal();
  $("confirm-no").focus();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

export async function deleteSession() {
  const s = state.session;
  if (!(await confirmed(`Delete “${sessions.nameOf(s)}” with its state and its snapshots? Branches that were forked from it stay.`))) return;
  await sessions.remove(s);
  store.dropText(s.id);
  state.points.delete(s.id);
  state.all = await sessions.list();
  const parent = state.all.find((x) => x.id === s.metadata.parent);
  if (parent) await open(parent.id);
  else await startAnew();
  say("Deleted");
}

export async function undoTurn() {
  take(await sessions.rollback(state.session));
  const turn = state.text.turns.pop();
  state.text.undo = false;
  bridge();
  remember();
  $("prompt").value = turn.prompt;
  showTurns();
  showSession();
  $("prompt").focus();
}
