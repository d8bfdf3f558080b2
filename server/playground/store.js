// store.js - what this page remembers. The server keeps states, not texts: the texts of turns are
// kept in the tab's own storage, which ends with it. Storage may be full or forbidden; the page then
// works on and forgets at a reload.

function read(storage, name, otherwise) {
  try {
    return JSON.parse(storage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function write(storage, name, value) {
  try {
    if (value === null) storage.removeItem(name);
    else storage.setItem(name, JSON.stringify(value));
  } catch { /* see above */ }
}

const tab = () => window.sessionStorage, browser = () => window.localStorage;

function guard(storage, fn, otherwise) {
  try {
    return fn(storage());
  } catch {
    return otherwise;
  }
}

export const keptKey = () => guard(tab, (s) => read(s, "latte.key", ""), "");
export const keepKey = (key) => guard(tab, (s) => write(s, "latte.key", key || null));

export const theme = () => guard(browser, (s) => read(s, "latte.theme", "system"), "system");
export const keepTheme = (name) => guard(browser, (s) => write(s, "latte.theme", name));

/** A generation that a reload would cut off: {session, stream, turn}. */
export const pending = () => guard(tab, (s) => read(s, "latte.pending", null), null);
export const keepPending = (value) => guard(tab, (s) => write(s, "latte.pending", value));

/** The text of a session: its turns, the turns at each snapshot, and whether the last turn can be
 *  taken back. Tokens' probabilities are left out: they are large. */
export function loadText(id) {
  return guard(tab, (s) => read(s, `latte.text.${id}`, null), null) ?? { turns: [], marks: {}, undo: false };
}

export function keepText(id, text) {
  const slim = ({ tokens, ...turn }) => turn;
  const marks = {};
  for (const name in text.marks) marks[name] = text.marks[name].map(slim);
  guard(tab, (s) => write(s, `latte.text.${id}`, { ...text, turns: text.turns.map(slim), marks }));
}

export const dropText = (id) => guard(tab, (s) => write(s, `latte.text.${id}`, null));
