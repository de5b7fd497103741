"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SURPRISING = 0.1;
// Who speaks, in the order of the columns: teachers, then students.
const speakers = [...data.teachers, ...data.students], isStudent = (c) => c >= data.teachers.length;
let at = 0, chosen = 0, source = 0;

// All text goes in by textContent, so that no token can be markup.
function make(kind, text, name) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}
const textOf = (id) => (data.texts ? data.texts[id] ?? `[${id}]` : String(id));
// What shows no ink is written as an escape where a token stands by itself; in the text, where it is all of a token.
const INKLESS = /^\p{M}|[\p{Cc}\p{Cf}\p{Cs}\p{Z}]/gu, ALL_INKLESS = /^(?![\n\t]+$)[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\p{M}]+$/u;
const inked = (text) => text.replace(INKLESS, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);
const visible = (id) => inked(textOf(id).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣"));
const inText = (id) => (ALL_INKLESS.test(textOf(id)) ? inked(textOf(id)) : textOf(id).replace(/\n/g, "⏎\n") || "∅");
const percent = (p) => (p === null ? "–" : p < 0.001 ? "< 0.1 %" : (100 * p).toFixed(1) + " %");
const sequence = () => data.sequences[at];
const positions = (s) => s.sizes.length;
// Where the rows of each position begin.
function begins(s) {
  if (!s.begins) { s.begins = [0]; for (const size of s.sizes) s.begins.push(s.begins[s.begins.length - 1] + size); }
  return s.begins;
}
// What a speaker has for each row, or null.
const values = (s, c) => (isStudent(c) ? s.students[c - data.teachers.length] : s.teachers[c].weights ?? null);
function hasRecord(s, c, t) {
  const own = values(s, c);
  for (let k = begins(s)[t]; own && k < begins(s)[t + 1]; k++) if (own[k]) return true;
  return false;
}
// The confidence in token t + 1 as a speaker has it: the label's row is the first of its position.
function confidence(s, t, c) {
  const own = values(s, c);
  if (!own || !s.tokens) return null;
  if (isStudent(c)) return own[begins(s)[t]] / speakers[c].scale;
  if (!hasRecord(s, c, t)) return null;
  return s.teachers[c].label ? s.teachers[c].label[t] / 10000 : own[begins(s)[t]] / speakers[c].scale;
}
function colour(p) {
  return p === null ? "none" : "c" + [0.01, 0.1, 0.5, 0.9].filter((bound) => p >= bound).length;
}

function show() {
  const s = sequence(), box = $("text"), all = document.createDocumentFragment();
  box.className = data.texts ? "" : "ids";
  for (let i = 0; i <= positions(s); i++) {
    const text = s.tokens ? (data.texts ? inText(s.tokens[i]) : s.tokens[i]) : "·";
    const span = make("span", text, i ? colour(confidence(s, i - 1, source)) : "");
    span.dataset.i = i;
    span.tabIndex = -1;
    if (positions(s)) all.append(span);
  }
  box.replaceChildren(all);
  const faults = s.teachers.map((one, c) => one.fault && make("p", `${data.teachers[c].path}: sequence ${s.number}: ${one.fault}`));
  $("faults").replaceChildren(...faults.filter(Boolean));
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
  const s = sequence(), panel = $("records"), label = s.tokens ? s.tokens[i] : null;
  const name = label === null ? "not stored" : data.texts ? `${visible(label)} (id ${label})` : `id ${label}`;
  panel.replaceChildren(make("h2", `Token ${i}: ${name}`));
  if (i === 0) panel.append(make("p", "The first token: nothing comes before it, so nobody foretold it."));
  else panel.append(records(s, i - 1));
}

// One row per id, one column per speaker, the largest first by whom the text is coloured.
function records(s, t) {
  const begin = begins(s)[t], table = make("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  head.append(make("th", "token"));
  speakers.forEach((one, c) => {
    const cell = make("th", one.name, (isStudent(c) ? "student" : "teacher") + (c === source ? " by" : ""));
    cell.title = one.path;
    cell.prepend(make("small", isStudent(c) ? "student" : "teacher"), make("br"));
    head.append(cell);
  });
  if (s.tokens) {
    const row = body.insertRow();
    row.className = "label";
    row.append(make("td", "this token"));
    speakers.forEach((one, c) => {
      const p = confidence(s, t, c), exact = isStudent(c) || s.teachers[c].label;
      const cell = make("td", p === 0 && !exact ? unsaid(c) : percent(p));
      if (p !== null) cell.append(make("br"), make("small", exact ? "exact" : "by records"));
      row.append(cell);
    });
  }
  const rows = Array.from({ length: s.sizes[t] }, (_, k) => begin + k);
  const weight = (k, c) => (values(s, c) ? values(s, c)[k] / speakers[c].scale : 0);
  const most = (k) => Math.max(...data.teachers.map((_, c) => weight(k, c)));
  rows.sort((a, b) => weight(b, source) - weight(a, source) || most(b) - most(a));
  for (const k of rows) {
    // The label has a row above; among the records it stands where somebody has one of it.
    if (s.tokens && k === begin && !data.teachers.some((_, c) => weight(k, c))) continue;
    const row = body.insertRow(), isLabel = s.tokens && k === begin;
    if (isLabel) row.className = "label";
    row.append(make("td", (isLabel ? "▸ " : "") + visible(s.ids[k]), "token"));
    speakers.forEach((one, c) => row.append(cellOf(s, t, c, weight(k, c))));
  }
  const rest = body.insertRow();
  rest.className = "rest";
  rest.append(make("td", "outside the records"));
  speakers.forEach((one, c) => rest.append(make("td", restOf(s, t, c, rows))));
  return table;
}
const unsaid = (c) => (data.teachers[c].drawn ? "not drawn" : "outside");
function cellOf(s, t, c, p) {
  if (!values(s, c) || (!isStudent(c) && !hasRecord(s, c, t))) return make("td", absent(s, c), "rest");
  if (!p && !isStudent(c)) return make("td", unsaid(c), "rest");
  const cell = make("td", percent(p)), bar = make("i");
  bar.style.width = `${4 * Math.min(1, p)}rem`;  // the same in every column
  cell.append(bar);
  return cell;
}
const absent = (s, c) => (isStudent(c) ? "–" : s.teachers[c].fault ? "fault" : "no record");
function restOf(s, t, c, rows) {
  const own = values(s, c);
  if (!own || (!isStudent(c) && !hasRecord(s, c, t))) return absent(s, c);
  if (isStudent(c)) return percent(Math.max(0, 1 - rows.reduce((sum, k) => sum + own[k], 0) / speakers[c].scale));
  return s.teachers[c].rest ? percent(s.teachers[c].rest[t] / 10000) : unsaid(c);
}

// The next place, in this sequence or those that follow, of which is(s, i) holds; the search goes round once.
function find(is) {
  for (let step = 0; step <= data.sequences.length; step++) {
    const n = (at + step) % data.sequences.length, s = data.sequences[n];
    for (let i = step ? 0 : chosen + 1; i <= positions(s); i++) {
      if (!is(s, i)) continue;
      if (n !== at) go(n);
      choose(i, true);
      return say("");
    }
  }
  say("nothing found");
}
const say = (text) => { $("status").textContent = text; };
const surprising = (s, i) => { const p = i ? confidence(s, i - 1, source) : null; return p !== null && p < SURPRISING; };
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
const isFaulty = (s) => s.teachers.some((one) => one.fault);
function findFault() {
  for (let step = 1; step <= data.sequences.length; step++) {
    const n = (at + step) % data.sequences.length;
    if (isFaulty(data.sequences[n])) return go(n);
  }
  say("no sequence with a fault");
}
function go(n) {
  if (n < 0 || n >= data.sequences.length) {
    $("sequence").value = sequence().number;
    return say(`not on this page, which has ${lowest} to ${highest}`);
  }
  say("");
  at = n;
  show();
}

speakers.forEach((one, c) => {
  const option = make("option", `${isStudent(c) ? "student" : "teacher"} ${one.name}`);
  option.value = c;
  $("source").append(option);
});
document.body.className = speakers.length > 3 ? "many" : "";
$("by").hidden = speakers.length < 2;
const [lowest, highest] = [data.sequences[0].number, data.sequences[data.sequences.length - 1].number];
$("of").textContent = lowest < highest ? `of ${lowest} to ${highest}` : "";
const faulty = data.sequences.filter(isFaulty).length;
$("fault").hidden = !faulty;
$("fault").textContent = `Next of ${faulty} ${faulty > 1 ? "faults" : "fault"}`;
$("source").onchange = () => { source = +$("source").value; const i = chosen; show(); choose(i); };
$("sequence").onchange = () => go(data.sequences.findIndex((s) => s.number === +$("sequence").value));
$("before").onclick = () => go(at - 1);
$("after").onclick = () => go(at + 1);
$("surprise").onclick = () => find(surprising);
$("fault").onclick = findFault;
$("search").onkeydown = (event) => { if (event.key === "Enter") search(); };
for (const kind of ["mouseover", "click", "focusin"])
  $("text").addEventListener(kind, (event) => { if (event.target.dataset.i) choose(+event.target.dataset.i); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { event.preventDefault(); return choose(chosen, true); }
  if (/INPUT|SELECT/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Enter" && !event.target.dataset.i) return;  // a button's own
  const act = {
    ArrowRight: () => choose(Math.min(chosen + 1, positions(sequence())), true),
    ArrowLeft: () => choose(Math.max(chosen - 1, 0), true),
    s: () => find(surprising), n: () => go(at + 1), p: () => go(at - 1), f: findFault, "/": () => $("search").focus(),
    Enter: search,
  }[event.key];
  if (act) { event.preventDefault(); act(); }
});
show();
