// view.js - what the page shows of its state.

import { Plot } from "./plot.js";
import { act } from "./problems.js";
import * as sessions from "./sessions.js";
import { open, rollBackTo, undoTurn } from "./branches.js";
import { edit, keepText, regenerate, tryAgain } from "./talk.js";
import { button, emptyElement, turnElement } from "./turns.js";

export const $ = (id) => document.getElementById(id);

export const state = {
  model: "",
  canChat: false,
  session: null, // as the server told last
  text: { turns: [], marks: {}, undo: false }, // its words, as far as this tab knows them
  all: [], // sessions of the playground
  points: new Map(), // session id -> points of the plot
  generation: null, // the one that runs
  busy: false,
};
export const plot = new Plot($("plot"), $("plot-now"));

export const mode = () => document.querySelector("input[name=mode]:checked")?.value ?? "completion";
export const say = (text) => { $("status").textContent = text; };
export const pointsOf = (id) => state.points.get(id) ?? state.points.set(id, []).get(id);

export function bytes(n) {
  return n >= 1e6 ? `${(n / 1e6).toFixed(2)} MB` : `${(n / 1e3).toFixed(1)} kB`;
}

const TIERS = { device: "GPU memory", host: "memory", store: "store" };

export function showSession() {
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

export function showSnapshots(list) {
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
    buttons.push(button("Try again", () => tryAgain(turn), { id: "again" }), button("Edit", () => edit(turn), { id: "edit" }));
  }
  return buttons;
}

export function showTurns() {
  const { turns } = state.text;
  $("log").replaceChildren(...(turns.length
    ? turns.map((t, i) => turnElement(t, state.model, actionsOf(t, i === turns.length - 1)))
    : [emptyElement(mode())]));
  $("log").scrollTop = $("log").scrollHeight;
  showBusy();
}

export function showMode() {
  const chat = mode() === "chat";
  $("system-box").hidden = !chat;
  $("prompt-label").textContent = chat ? "Message" : "Text to go on from";
  $("prompt").placeholder = chat ? "Message" : "Once upon a time";
  if (!state.text.turns.length) showTurns();
}

export function showBusy() {
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
