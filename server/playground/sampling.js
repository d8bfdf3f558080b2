// sampling.js - the controls of sampling: a field for each parameter of a request.

const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05 },
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, value: 128, integer: true },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", min: 0, step: 1, integer: true },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01 },
  { name: "seed", label: "Seed", step: 1, integer: true },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, step: 0.05 },
];

const form = document.getElementById("sampling");
const inputs = {};

function field({ name, label, wide }, input) {
  const e = document.createElement("label");
  if (wide) e.className = "wide";
  input.id = `p-${name}`;
  e.htmlFor = input.id;
  e.append(label, input);
  inputs[name] = input;
  input.addEventListener("input", () => unmark(input));
  return e;
}

export function openSampling() {
  for (const f of FIELDS) {
    const input = document.createElement("input");
    Object.assign(input, { type: "number", step: f.integer ? 1 : "any", placeholder: "default", value: f.value ?? "" });
    if (!f.integer) input.dataset.step = f.step;
    input.addEventListener("keydown", (e) => nudge(e, f));
    form.append(field(f, input));
  }
  const stop = document.createElement("textarea");
  Object.assign(stop, { rows: 2, placeholder: "one a line; \\n is a new line", spellcheck: false });
  form.append(field({ name: "stop", label: "Stop strings", wide: true }, stop));
  form.addEventListener("submit", (e) => e.preventDefault());
}

/** Any number may be typed; the arrow keys go in sensible steps. */
function nudge(e, { step, integer, min = -Infinity, max = Infinity }) {
  const way = { ArrowUp: 1, ArrowDown: -1 }[e.key];
  if (!way || integer) return;
  e.preventDefault();
  const next = Math.max(min, Math.min(max, Number(e.target.value || (min > 0 ? 1 : 0)) + way * step));
  e.target.value = String(Number(next.toFixed(4)));
  unmark(e.target);
}

export function resetSampling() {
  for (const f of FIELDS) inputs[f.name].value = f.value ?? "";
  inputs.stop.value = "";
  clearMarks();
}

/** What was filled in, as fields of a request of this kind. The server checks the values: it knows
 *  its limits, and says which field is wrong. */
export function sampling(kind) {
  const out = {};
  for (const f of FIELDS) {
    const input = inputs[f.name], text = input.value.trim();
    if (input.validity.badInput) throw Object.assign(new Error(`${f.label} is not a number.`), { param: f.name });
    if (text) out[f.name] = Number(text);
  }
  const stops = inputs.stop.value.split("\n").filter(Boolean)
    .map((s) => s.replace(/\\([nt\\])/g, (_, c) => ({ n: "\n", t: "\t", "\\": "\\" })[c]));
  if (stops.length) out.stop = stops;
  if (kind === "chat" && out.max_tokens !== undefined) {
    out.max_completion_tokens = out.max_tokens;
    delete out.max_tokens;
  }
  return out;
}

function unmark(input) {
  input.removeAttribute("aria-invalid");
  input.removeAttribute("aria-describedby");
  input.parentElement.querySelector(".wrong")?.remove();
}

export function clearMarks() {
  for (const name in inputs) unmark(inputs[name]);
}

/** Show at the field what is wrong with it. The field, or null when the parameter has none. */
export function mark(param, message) {
  const name = param.replace("max_completion_tokens", "max_tokens").split(/[.[]/)[0], input = inputs[name];
  if (!input) return null;
  unmark(input);
  const note = document.createElement("span");
  note.className = "wrong";
  note.id = `p-${name}-wrong`;
  note.textContent = message;
  input.after(note);
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", note.id);
  return input;
}
