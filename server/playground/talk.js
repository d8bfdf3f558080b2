// talk.js - turns: from the prompt to the answer, and back.

import { api, ApiError, Generation, LostError, StoppedError } from "./api.js";
import { tokensOf } from "./answer.js";
import { dropUnapplied, remember, take } from "./branches.js";
import { median, milliseconds, Stopwatch } from "./plot.js";
import { act, clearBanner, explain, newest, showBanner } from "./problems.js";
import { clearMarks, sampling } from "./sampling.js";
import * as sessions from "./sessions.js";
import * as store from "./store.js";
import { $, mode, plot, pointsOf, say, showBusy, showSession, showTurns, state } from "./view.js";

const TOP = 5; // alternatives asked for with each token

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
    turn.ms = median(times.slice(-64));
    plot.add(position, ms);
  });
  plot.show(points);
  let painting = false, isAtEnd = true, position = session.position;
  const paint = () => { // once a frame: each look at the log's height is a layout of all of it
    painting = false;
    if (turn.state !== "running") return;
    const log = $("log");
    if (isAtEnd) log.scrollTop = log.scrollHeight;
    $("f-position").textContent = position.toLocaleString("en");
    $("progress").textContent = `${turn.n} tokens${turn.ms ? `, ${milliseconds(turn.ms)} each` : ""}`;
  };
  $("log").onscroll = ({ target: log }) => { isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 120; };
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
        position = session.position + usage.total_tokens;
      }
      if (turn.n > before) watch.note(turn.n - before, position, performance.now());
      if (chunk.session) turn.place = chunk.session;
      if (!choice) return;
      element.answer.add(choice.text ?? choice.delta?.content ?? "", tokensOf(choice));
      if (choice.finish_reason) turn.finish = choice.finish_reason;
      if (painting) return;
      painting = true;
      requestAnimationFrame(paint);
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
    for (let n = 0; n < 20 && session.in_turn && error instanceof StoppedError; n++) { // it ends with the step that runs
      await new Promise((resolve) => setTimeout(resolve, 100));
      session = await sessions.retrieve(state.session.id);
    }
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
  let error = null;
  try {
    await begin(generation);
  } catch (e) {
    error = e;
  }
  const mayHaveRun = generation.id !== null || (error instanceof ApiError && error.status === 0);
  store.keepPending(null);
  state.generation = null;
  if (mayHaveRun || !error) {
    error = await settle(turn, element, error);
  } else { // refused: nothing was done, and the words go back to where they came from
    text.turns.pop();
    if (!$("prompt").value) $("prompt").value = turn.prompt;
  }
  $("progress").textContent = "";
  remember();
  showTurns();
  showSession();
  tell(turn, error);
  if (error && !(error instanceof StoppedError) && !(error instanceof LostError))
    explain(error, () => { $("prompt").value = ""; tryAgain(turn); });
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

export function send() {
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

/** The server ends it when it has a name, that is with its first token at the latest. */
export function stop() {
  state.generation?.stop();
  $("progress").textContent = "stopping …";
}

/** The last turn once more: back to the snapshot that the server keeps of its beginning. */
export async function regenerate() {
  const turn = state.text.turns.at(-1);
  let back = false;
  await act(async () => {
    take(await sessions.rollback(state.session));
    state.text.turns.pop();
    state.text.undo = false;
    back = true;
  });
  if (back) await generate(turn);
}

/** A stopped completion is text like any other: the session reads it, and draws nothing. */
export async function keepText(turn) {
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
export async function resumePending() {
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

/** An answer that was not applied: the same turn once more, or its words to be changed. */
export function tryAgain(turn) {
  dropUnapplied();
  generate(turn);
}

export function edit(turn) {
  dropUnapplied();
  $("prompt").value = turn.prompt;
  showTurns();
  $("prompt").focus();
}
