"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SURPRISING = 0.1;
let at = 0, chosen = 0, source = 0;

// All text goes in by textContent, so that no token can be markup.
function make(kind, text, name) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}
const textOf = (id) => (data.texts ? data.texts[id] ?? `[${id}]` : String(id));
const visible = (id) => textOf(id).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣");
const percent = (p) => (p === null || p === undefined ? "–" : p > 0 && p < 0.001 ? "< 0.1 %" : (100 * p).toFixed(1) + " %");
const sequence = () => data.sequences[at];
const positions = (s) => {
  if (s.tokens) return s.tokens.length - 1;
  const said = s.said.find((one) => !one.fault);
  return said ? said.sizes.length : 0;
};
// The confidence in token t + 1, by the source that colours.
function confidence(s, t) {
  if (source === data.caches.length) return s.student ? s.student.label[t] : null;
  const label = s.said[source].label;
  return label ? label[t] : null;
}
function colour(p) {
  return p === null ? "none" : "c" + [0.01, 0.1, 0.5, 0.9].filter((bound) => p >= bound).length;
}

function show() {
  const s = sequence(), box = $("text"), all = document.createDocumentFragment();
  box.className = data.texts ? "" : "ids";
  for (let i = 0; i <= positions(s); i++) {
    const text = s.tokens ? (data.texts ? textOf(s.tokens[i]).replace(/\n/g, "⏎\n") || "∅" : s.tokens[i]) : "·";
    const span = make("span", text, i ? colour(confidence(s, i - 1)) : "");
    span.dataset.i = i;
    span.tabIndex = i === 1 ? 0 : -1;
    all.append(span);
  }
  box.replaceChildren(all);
  const names = s.said.map((one, c) => one.fault && make("p", `${data.caches[c]}: sequence ${s.number}: ${one.fault}`));
  $("faults").replaceChildren(...names.filter(Boolean));
  $("sequence").value = s.number;
  choose(Math.min(1, positions(s)));
}

function choose(i, focus) {
  const spans = $("text").children;
  if (!spans[i]) return $("records").replaceChildren();
  if (spans[chosen]) { spans[chosen].classList.remove("chosen"); spans[chosen].tabIndex = -1; }
  chosen = i;
  spans[i].classList.add("chosen");
  spans[i].tabIndex = 0;
  if (focus) spans[i].focus();
  const s = sequence(), panel = $("records"), t = i - 1, label = s.tokens ? s.tokens[i] : null;
  const name = label === null ? "token not stored" : `${data.texts ? visible(label) + "  " : ""}id ${label}`;
  panel.replaceChildren(make("h2", `Token ${i}: ${name}`));
  if (i === 0) return panel.append(make("p", "The first token: nothing comes before it, so nobody foretold it."));
  if (s.student) panel.append(make("p", `Student: ${percent(s.student.label[t])} for this token`));
  s.said.forEach((one, c) => panel.append(...records(s, one, c, t, label)));
}

function records(s, one, c, t, label) {
  const title = make("h2", data.caches[c]);
  if (one.fault) return [title, make("p", one.fault)];
  if (!one.sizes[t]) return [title, make("p", "No record at this position.")];
  let begin = 0;
  for (let k = 0; k < t; k++) begin += one.sizes[k];
  const rows = Array.from({ length: one.sizes[t] }, (_, k) => begin + k).sort((a, b) => one.weights[b] - one.weights[a]);
  const answers = s.student && s.student.records[c], table = make("table"), head = table.insertRow();
  for (const word of ["token", "teacher", ...(answers ? ["student"] : [])]) head.append(make("th", word));
  for (const k of rows) {
    const row = table.insertRow();
    if (one.ids[k] === label) row.className = "label";
    row.append(make("td", (one.ids[k] === label ? "▸ " : "") + visible(one.ids[k])));
    const bar = make("i"), cell = make("td", percent(one.weights[k]));
    bar.style.width = `${Math.min(100, 100 * one.weights[k])}%`;
    cell.append(bar);
    row.append(cell);
    if (answers) row.append(make("td", percent(answers[k])));
  }
  const rest = table.insertRow();
  rest.className = "rest";
  rest.append(make("td", "rest"), make("td", percent(one.rest[t])));
  const how = one.exact ? "exact" : "share of the record";
  return [title, make("p", `Teacher: ${percent(one.label && one.label[t])} for this token (${how})`), table];
}

// The next place, in this sequence or those that follow, of which is(s, i) holds; the search goes round once.
function find(is) {
  for (let step = 0; step <= data.sequences.length; step++) {
    const n = (at + step) % data.sequences.length, s = data.sequences[n];
    for (let i = step ? 1 : chosen + 1; i <= positions(s); i++) {
      if (!is(s, i)) continue;
      if (n !== at) go(n);
      choose(i, true);
      return say("");
    }
  }
  say("nothing found");
}
const say = (text) => { $("status").textContent = text; };
const surprising = (s, i) => { const p = confidence(s, i - 1); return p !== null && p < SURPRISING; };
function search() {
  const wanted = $("search").value.toLowerCase();
  // Words may span tokens: the text from a token on must begin inside it.
  if (wanted) find((s, i) => {
    if (!s.tokens) return false;
    if (!data.texts) return String(s.tokens[i]) === wanted.trim();
    const own = textOf(s.tokens[i]);
    let text = own;
    for (let k = i + 1; k < s.tokens.length && text.length < own.length + wanted.length; k++) text += textOf(s.tokens[k]);
    const where = text.toLowerCase().indexOf(wanted);
    return where >= 0 && where < own.length;
  });
}
function go(n) {
  if (n < 0 || n >= data.sequences.length) return say(`no sequence there; ${data.sequences.length} are on this page`);
  say("");
  at = n;
  show();
}

[...data.caches, ...(data.student ? [`student ${data.student}`] : [])].forEach((name, c) => {
  const option = make("option", name);
  option.value = c;
  $("source").append(option);
});
$("by").hidden = data.caches.length + (data.student ? 1 : 0) < 2;
$("source").onchange = () => { source = +$("source").value; const i = chosen; show(); choose(i); };
$("sequence").onchange = () => go(data.sequences.findIndex((s) => s.number === +$("sequence").value));
$("before").onclick = () => go(at - 1);
$("after").onclick = () => go(at + 1);
$("surprise").onclick = () => find(surprising);
$("search").onkeydown = (event) => { if (event.key === "Enter") search(); };
for (const kind of ["mouseover", "click", "focusin"])
  $("text").addEventListener(kind, (event) => { if (event.target.dataset.i) choose(+event.target.dataset.i); });
document.addEventListener("keydown", (event) => {
  if (/INPUT|SELECT/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = {
    ArrowRight: () => choose(Math.min(chosen + 1, positions(sequence())), true),
    ArrowLeft: () => choose(Math.max(chosen - 1, 0), true),
    s: () => find(surprising), n: () => go(at + 1), p: () => go(at - 1), "/": () => $("search").focus(),
  }[event.key];
  if (act) { event.preventDefault(); act(); }
});
show();
