// app.js - the page: what is shown, and what its buttons do.

import { api, ApiError, Generation, LostError, StoppedError } from "./api.js";
import { tokensOf } from "./answer.js";
import { median, milliseconds, Plot, Stopwatch } from "./plot.js";
import { clearMarks, mark, openSampling, resetSampling, sampling } from "./sampling.js";
import * as sessions from "./sessions.js";
import * as store from "./store.js";
import { button, emptyElement, turnElement } from "./turns.js";

const $ = (id) => document.getElementById(id);
const TOP = 5; // alternatives asked for with each token

const state = {
  model: "",
  canChat: false,
  session: null, // as the server told last
  text: { turns: [], marks: {}, undo: false }, // its words, as far as this tab knows them
  all: [], // sessions of the playground
  points: new Map(), // session id -> points of the plot
  generation: null, // the one that runs
  busy: false,
};
const plot = new Plot($("plot"), $("plot-now"));

const mode = () => document.querySelector("input[name=mode]:checked")?.value ?? "completion";
const say = (text) => { $("status").textContent = text; };
const pointsOf = (id) => state.points.get(id) ?? state.points.set(id, []).get(id);

// ---- what is shown ------------------------------------------------------------------------------

function bytes(n) {
  return n >= 1e6 ? `${(n / 1e6).toFixed(2)} MB` : `${(n / 1e3).toFixed(1)} kB`;
}

const TIERS = { device: "GPU memory", host: "memory", store: "store" };

function showSession() {
  const s = state.session;
  $("session-none").hidden = Boolean(s);
  $("session-facts").hidden = !s;
  if (s) {
    $("f-position").textContent = s.position.toLocaleString("en");
    $("f-version").textContent = s.version;
    $("f-bytes").textContent = bytes(s.state_bytes);
    $("f-bytes").title = `${s.state_bytes.toLocaleString("en")} bytes`;
    $("f-tier").textContent = TIERS[s.tier] ?? s.tier;
    $("f-tier").title = s.tier;
    $("f-id").textContent = s.id;
  }
  sessions.renderTree($("tree"), state.all, s?.id ?? "", (id) => act(() => open(id)));
  plot.show(s ? pointsOf(s.id) : []);
  showBusy();
}

function showSnapshots(list) {
  $("snapshots").replaceChildren(...list.map((x) => {
    const li = document.createElement("li"), name = document.createElement("b"), at = document.createElement("span");
    name.textContent = x.name;
    at.textContent = x.position.toLocaleString("en");
    const back = button("Roll back", () => act(() => rollBackTo(x.name)));
    back.setAttribute("aria-label", `Roll back to ${x.name}`);
    li.append(name, at, back);
    return li;
  }));
}

/** What can be done with a turn. */
function actionsOf(turn, isLast) {
  const buttons = [];
  if (turn.state === "done" && isLast && state.text.undo)
    buttons.push(button("Regenerate", () => regenerate(), { id: "regenerate" }),
      button("Undo turn", () => act(undoTurn), { id: "undo" }));
  if (turn.state === "stopped" || turn.state === "failed") {
    if (turn.kind === "completion" && turn.text)
      buttons.push(button("Keep the text", () => keepText(turn), { id: "keep-text" }));
    buttons.push(button("Try again", () => { dropUnapplied(); generate(turn); }, { id: "again" }),
      button("Edit", () => { dropUnapplied(); $("prompt").value = turn.prompt; showTurns(); $("prompt").focus(); }, { id: "edit" }));
  }
  return buttons;
}

function showTurns() {
  const { turns } = state.text;
  $("log").replaceChildren(...(turns.length
    ? turns.map((t, i) => turnElement(t, state.model, actionsOf(t, i === turns.length - 1)))
    : [emptyElement(mode())]));
  $("log").scrollTop = $("log").scrollHeight;
  showBusy();
}

function showMode() {
  const chat = mode() === "chat";
  $("system-box").hidden = !chat;
  $("prompt-label").textContent = chat ? "Message" : "Text to go on from";
  $("prompt").placeholder = chat ? "Message" : "Once upon a time";
  if (!state.text.turns.length) showTurns();
}

function showBusy() {
  const { busy, session: s } = state, running = Boolean(state.generation), empty = !s || s.position === 0;
  const hadFocus = document.activeElement;
  $("log").setAttribute("aria-busy", String(running));
  $("stop").hidden = !running;
  $("send").hidden = running;
  $("send").disabled = busy;
  $("fork").disabled = $("export").disabled = $("snapshot-make").disabled = busy || empty;
  $("refresh").disabled = $("delete").disabled = busy || !s;
  $("import").disabled = $("new").disabled = busy;
  for (const e of document.querySelectorAll("#tree button, #snapshots button, .foot button")) e.disabled = busy;
  if (hadFocus === $("send") && running) $("stop").focus();
  if (hadFocus === $("stop") && !running) $("prompt").focus();
}

// ---- errors -------------------------------------------------------------------------------------

function clearBanner() {
  $("banner").hidden = true;
  $("banner").replaceChildren();
}

function showBanner(title, text, actions = []) {
  const strong = document.createElement("strong"), p = document.createElement("p");
  strong.textContent = title;
  p.textContent = text;
  const parts = [strong, p];
  if (actions.length) {
    const row = document.createElement("div");
    row.className = "actions";
    row.append(...actions);
    parts.push(row);
  }
  $("banner").replaceChildren(...parts);
  $("banner").hidden = false;
}

const retryButton = (retry) => button("Try again", () => { clearBanner(); retry(); }, { className: "", id: "retry" });

function askForKey(message) {
  toggleKey(true);
  showBanner("An API key is needed", `${message} Enter a key above.`);
  $("key").focus();
}

/** 429: say how long to wait, and let the button wait, too. */
function showTooMany(e, retry) {
  const again = retryButton(retry), seconds = e.retryAfter ?? 1;
  again.disabled = true;
  setTimeout(() => { again.disabled = false; }, seconds * 1000);
  showBanner("The server is busy", `${e.message} It asks to wait ${seconds} s.`, [again]);
}

function showWrongField(e) {
  const input = mark(e.param, e.message);
  showBanner(`Not accepted: ${e.param}`, e.message);
  if (!input) return;
  if (!input.checkVisibility()) togglePanel(true);
  input.focus();
}

const newest = () => button("Load the newest", () => act(refresh), { className: "", id: "newest" });

/** Say what went wrong and what can be done. retry: does it once more. */
function explain(e, retry) {
  if (!(e instanceof ApiError)) {
    if (e.param) showWrongField(e);
    else showBanner("This did not work", e.message);
    if (!e.param && !(e instanceof LostError)) console.error(e);
    return;
  }
  if (e.status === 401) askForKey(e.message);
  else if (e.status === 429) showTooMany(e, retry);
  else if (e.status === 412) showBanner("The session has moved on", `${e.message} Another tab or client has used it. Nothing was changed.`, [newest()]);
  else if (e.status === 409 && e.retryAfter) showBanner("The session is in use", e.message, [retryButton(retry), newest()]);
  else if (e.code === "session_not_found" && e.param !== "snapshot")
    showBanner("This session is gone", `${e.message} It was deleted or not used for long; its states are gone, too.`,
      [button("New session", () => act(startAnew), { className: "", id: "gone-new" })]);
  else if (e.status === 0) showBanner("No connection", e.message, [retryButton(retry)]);
  else if (e.status === 503) showBanner("The server does not take requests just now", e.message, [retryButton(retry)]);
  else if (e.param) showWrongField(e);
  else showBanner(`The server answered ${e.status}`, e.message);
}

/** One thing at a time. */
async function act(what) {
  if (state.busy) return;
  clearBanner();
  state.busy = true;
  showBusy();
  try {
    await what();
  } catch (e) {
    explain(e, () => act(what));
  } finally {
    state.busy = false;
    showBusy();
  }
}

// ---- sessions -----------------------------------------------------------------------------------

function remember() {
  if (state.session) store.keepText(state.session.id, { ...state.text, turns: state.text.turns.filter(isApplied) });
}

const isApplied = (t) => t.state === "done" || t.state === "gap";

function dropUnapplied() {
  state.text.turns = state.text.turns.filter(isApplied);
}

/** The server's word on the session; what it did without this tab becomes a gap. */
function take(session) {
  state.session = session;
  const known = state.all.findIndex((s) => s.id === session.id);
  if (known >= 0) state.all[known] = session;
  else if (session.metadata.playground === "1") state.all.push(session);
}

function bridge() {
  const { turns } = state.text, { position } = state.session;
  while (turns.length && isApplied(turns.at(-1)) && (turns.at(-1).end ?? turns.at(-1).to) > position) turns.pop();
  const last = turns.filter(isApplied).at(-1), end = last ? last.end ?? last.to : 0;
  if (position === end) return;
  turns.push({ state: "gap", from: end, to: position });
  state.text.undo = false;
}

async function refresh() {
  if (state.session) {
    const before = state.session.version;
    take(await sessions.retrieve(state.session.id));
    dropUnapplied();
    bridge();
    if (state.session.version !== before) state.text.undo = false;
    remember();
  }
  state.all = await sessions.list();
  showSnapshots(state.session ? await sessions.snapshots(state.session.id) : []);
  showTurns();
  showSession();
}

async function open(id) {
  const session = await sessions.retrieve(id);
  take(session);
  state.text = store.loadText(id);
  bridge();
  history.replaceState(null, "", `#${id}`);
  showSnapshots(await sessions.snapshots(id));
  showTurns();
  showSession();
  say(`${sessions.nameOf(session)}, position ${session.position}`);
}

async function startAnew() {
  state.session = null;
  state.text = { turns: [], marks: {}, undo: false };
  history.replaceState(null, "", location.pathname + location.search);
  showSnapshots([]);
  showTurns();
  showSession();
  $("prompt").focus();
}

async function fork() {
  const child = await sessions.fork(state.session, state.all);
  const { turns, marks } = state.text;
  store.keepText(child.id, { turns: turns.filter(isApplied), marks: {}, undo: false });
  const tokens = turns.map((t) => t.tokens);
  state.points.set(child.id, [...pointsOf(state.session.id)]);
  void marks; // snapshots stay the parent's
  await refresh();
  await open(child.id);
  state.text.turns.forEach((t, i) => { t.tokens ??= tokens[i]; });
  showTurns();
}

async function rollBackTo(name) {
  take(await sessions.rollback(state.session.id, name));
  state.text.turns = [...(state.text.marks[name] ?? state.text.turns)];
  state.text.undo = false;
  dropUnapplied();
  bridge();
  remember();
  showTurns();
  showSession();
  say(`Rolled back to ${name}, position ${state.session.position}`);
}

async function makeSnapshot() {
  const name = $("snapshot-name").value.trim() || `at ${state.session.position}`;
  await sessions.snapshot(state.session.id, name);
  state.text.marks[name] = state.text.turns.filter(isApplied);
  remember();
  $("snapshot-name").value = "";
  showSnapshots(await sessions.snapshots(state.session.id));
  take(await sessions.retrieve(state.session.id));
  showSession();
  say(`Snapshot ${name} kept`);
}

async function exportState() {
  const blob = await sessions.exported(state.session.id), link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `latte-${state.session.id.slice(5, 13)}-${state.session.position}.state`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  say(`Exported ${bytes(blob.size)}`);
}

/** A file becomes a session of its own, so that nothing is replaced. */
async function importState(file) {
  const made = await sessions.create(file.name);
  try {
    await sessions.imported(made.id, file);
  } catch (e) {
    await sessions.remove(made.id).catch(() => {});
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

async function deleteSession() {
  const s = state.session;
  if (!(await confirmed(`Delete “${sessions.nameOf(s)}” with its state and its snapshots? Branches that were forked from it stay.`))) return;
  await sessions.remove(s.id);
  store.dropText(s.id);
  state.points.delete(s.id);
  state.all = await sessions.list();
  const parent = state.all.find((x) => x.id === s.metadata.parent);
  if (parent) await open(parent.id);
  else await startAnew();
  say("Deleted");
}

async function undoTurn() {
  await expectVersion();
  take(await sessions.rollback(state.session.id));
  const turn = state.text.turns.pop();
  state.text.undo = false;
  bridge();
  remember();
  $("prompt").value = turn.prompt;
  showTurns();
  showSession();
  $("prompt").focus();
}

/** Rolling back has no If-Match: look first. */
async function expectVersion() {
  const now = await sessions.retrieve(state.session.id), { version, id } = state.session;
  if (now.version !== version)
    throw new ApiError(`Session '${id}' is at version ${now.version}; expected version ${version}.`, { status: 412 });
}

// ---- turns --------------------------------------------------------------------------------------

function requestOf(turn) {
  const body = { model: state.model, session_id: state.session.id, ...sampling(turn.kind), stream_options: { include_usage: true, continuous_usage_stats: true } };
  const logprobs = $("with-logprobs").checked;
  if (turn.kind === "completion")
    return ["v1/completions", { ...body, prompt: turn.prompt, ...(logprobs && { logprobs: TOP }) }];
  const messages = [{ role: "user", content: turn.prompt }];
  if (turn.system) messages.unshift({ role: "system", content: turn.system });
  return ["v1/chat/completions", { ...body, messages, ...(logprobs && { logprobs: true, top_logprobs: TOP }) }];
}

/** What the events of a generation do to a turn and its element. */
function follow(turn, element, session) {
  const times = [], points = pointsOf(session.id);
  const watch = new Stopwatch((position, ms) => {
    times.push(ms);
    plot.add(position, ms);
  });
  plot.show(points);
  return {
    onId: (id) => store.keepPending({ session: session.id, stream: id, turn: { ...turn, text: "", tokens: null, n: 0, version: session.version } }),
    onRetry: (n, of) => {
      watch.skip();
      $("progress").textContent = `connection lost, trying again (${n} of ${of})`;
      if (n === 1) say("The connection was lost. Trying again.");
    },
    onBack: () => { $("progress").textContent = ""; say("Connected again."); },
    onEvent: (chunk) => {
      const choice = chunk.choices[0], usage = chunk.usage, before = turn.n;
      if (usage) {
        turn.n = usage.completion_tokens;
        $("f-position").textContent = (session.position + usage.total_tokens).toLocaleString("en");
      }
      if (turn.n > before) watch.note(turn.n - before, session.position + usage.total_tokens, performance.now());
      turn.ms = times.length ? median(times) : null;
      if (chunk.session) turn.place = chunk.session;
      if (!choice) return;
      element.answer.add(choice.text ?? choice.delta?.content ?? "", tokensOf(choice));
      if (choice.finish_reason) turn.finish = choice.finish_reason;
      const log = $("log");
      if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
      $("progress").textContent = `${turn.n} tokens${turn.ms ? `, ${milliseconds(turn.ms)} each` : ""}`;
    },
  };
}

/** The stream ended in some way; what did the session make of it? */
async function settle(turn, element, error) {
  element.answer.finish();
  turn.text = element.answer.text;
  turn.tokens = element.answer.tokens;
  const version = state.session.version;
  let session = null;
  try {
    session = await sessions.retrieve(state.session.id);
  } catch (e) {
    error ??= e;
  }
  const applied = session ? session.version > version : Boolean(turn.place);
  if (session && session.version >= version) take(session);
  turn.state = applied ? "done" : error instanceof StoppedError ? "stopped" : "failed";
  if (applied) {
    turn.end = state.session.position;
    state.text.undo = true;
    if (error) turn.finish = "its end did not arrive here";
  }
  return error;
}

function tell(turn, error) {
  if (!error && turn.state === "done") say(`Answer of ${turn.n} tokens: ${turn.text.slice(0, 600)}`);
  if (error instanceof StoppedError) say(turn.state === "done" ? "It had ended already." : "Stopped.");
  else if (error instanceof LostError)
    showBanner("The connection was lost", turn.state === "done"
      ? `${error.message} The server has applied the turn, but the end of its text is not here. Go on, or undo the turn and try again.`
      : `${error.message} The turn is not applied${state.session.in_turn ? " yet: it may still be running; refresh to see" : ""}.`, [newest()]);
}

/** Run a turn: {kind, prompt, system}. begin(generation) starts it. */
async function run(turn, begin) {
  const { session, text } = state;
  Object.assign(turn, { state: "running", text: "", tokens: null, n: 0, ms: null, finish: null, start: session.position, place: null });
  dropUnapplied();
  text.turns.push(turn);
  showTurns();
  const element = $("log").lastElementChild;
  const generation = new Generation(follow(turn, element, session));
  state.generation = generation;
  showBusy();
  say("The model answers.");
  let error = null, mayHaveRun = false;
  try {
    await begin(generation);
  } catch (e) {
    error = e;
  }
  mayHaveRun = generation.id !== null || (error instanceof ApiError && error.status === 0);
  store.keepPending(null);
  state.generation = null;
  $("progress").textContent = "";
  if (mayHaveRun || !error) {
    error = await settle(turn, element, error);
  } else { // refused: nothing was done, and the words go back to where they came from
    text.turns.pop();
    if (!$("prompt").value) $("prompt").value = turn.prompt;
  }
  remember();
  showTurns();
  showSession();
  tell(turn, error);
  if (error && !(error instanceof StoppedError) && !(error instanceof LostError))
    explain(error, () => { dropUnapplied(); $("prompt").value = ""; generate(turn); });
}

/** A turn of the current session, or of a new one. */
async function generate({ kind, prompt, system }) {
  if (state.busy) return;
  clearBanner();
  clearMarks();
  state.busy = true;
  showBusy();
  const turn = { kind, prompt, system };
  try {
    if (!state.session) {
      sampling(kind); // wrong fields before a session is made
      take(await sessions.create(prompt));
      history.replaceState(null, "", `#${state.session.id}`);
      showSession();
    }
    const [path, body] = requestOf(turn);
    await run(turn, (generation) => generation.start(path, body, state.session.version));
  } catch (e) {
    if (!$("prompt").value) $("prompt").value = prompt;
    explain(e, () => { $("prompt").value = ""; generate(turn); });
  } finally {
    state.busy = false;
    showBusy();
  }
}

function send() {
  const prompt = $("prompt").value, kind = mode();
  if (state.busy) return;
  if (!prompt.trim()) {
    say("There is nothing to send.");
    $("prompt").focus();
    return;
  }
  const first = !state.session || state.session.position === 0;
  $("prompt").value = "";
  generate({ kind, prompt, system: kind === "chat" && first ? $("system").value.trim() : "" });
}

/** The last turn once more: back to the snapshot that the server keeps of its beginning. */
async function regenerate() {
  const turn = state.text.turns.at(-1);
  let back = false;
  await act(async () => {
    await expectVersion();
    take(await sessions.rollback(state.session.id));
    state.text.turns.pop();
    state.text.undo = false;
    back = true;
  });
  if (back) await generate(turn);
}

/** A stopped completion is text like any other: the session reads it, and draws nothing. */
async function keepText(turn) {
  const words = turn.text, whole = turn.prompt + words;
  dropUnapplied();
  await act(async () => {
    const reply = await api.json("v1/completions", {
      json: { model: state.model, session_id: state.session.id, prompt: whole, max_tokens: 0 },
      headers: { "If-Match": `"${state.session.version}"` },
    });
    take(await sessions.retrieve(reply.session.id));
    state.text.turns.push({ ...turn, state: "done", finish: "stopped by you and kept", end: state.session.position });
    state.text.undo = true;
    remember();
  });
  showTurns();
  showSession();
}

/** An answer that this page was reading when it was reloaded. */
async function resumePending() {
  const waiting = store.pending();
  if (!waiting || waiting.session !== state.session?.id) return;
  const { turn, stream } = waiting;
  if (turn.version !== state.session.version) { // it has ended meanwhile
    state.session = { ...state.session, version: turn.version, position: turn.start };
    state.text.turns = state.text.turns.filter((t) => t.state !== "gap" || t.to <= turn.start);
  }
  state.busy = true;
  try {
    await run(turn, (generation) => generation.resume(stream));
  } finally {
    state.busy = false;
    showBusy();
  }
}

// ---- the bar ------------------------------------------------------------------------------------

function toggleKey(open = $("key-form").hidden) {
  $("key-form").hidden = !open;
  $("key-toggle").setAttribute("aria-expanded", String(open));
  if (open) $("key").focus();
}

function togglePanel(open = !document.body.classList.contains("panel-open")) {
  document.body.classList.toggle("panel-open", open);
  $("panel-toggle").setAttribute("aria-expanded", String(open));
  $("panel-toggle").textContent = open ? "Conversation" : "Session";
  if (open) $("panel").focus();
  plot.draw();
}

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
  if (id) await open(id);
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
  if (now && !state.busy && now.id === state.session?.id && now.version !== state.session.version) await act(refresh);
}

function listen() {
  $("composer").addEventListener("submit", (e) => { e.preventDefault(); send(); });
  $("stop").addEventListener("click", () => state.generation?.stop());
  $("new").addEventListener("click", () => act(startAnew));
  $("fork").addEventListener("click", () => act(fork));
  $("export").addEventListener("click", () => act(exportState));
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", (e) => {
    const [file] = e.target.files;
    e.target.value = "";
    if (file) act(() => importState(file));
  });
  $("refresh").addEventListener("click", () => act(refresh));
  $("delete").addEventListener("click", () => act(deleteSession));
  $("snapshot-form").addEventListener("submit", (e) => { e.preventDefault(); if (!$("snapshot-make").disabled) act(makeSnapshot); });
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
    if (e.key === "Escape" && state.generation) { e.preventDefault(); state.generation.stop(); }
  });
  document.addEventListener("visibilitychange", look);
  addEventListener("hashchange", () => {
    const id = decodeURIComponent(location.hash.slice(1));
    if (id && id !== state.session?.id) act(() => open(id));
  });
}

showTheme(store.theme());
openSampling();
listen();
api.key = store.keptKey();
$("key").value = api.key;
$("key-keep").checked = Boolean(api.key);
begin();
