// The table of keys: only the rows in sight exist as elements, so that 50,000 keys cost as much as 50.
const OVERSCAN = 6;
const FIXED_COLUMNS = 300;
const CHARACTER = 7.6;
const HEAD = 36;
const SIGNALS = ["name", "shape", "size", "order", "context"];
const MAX_PRINTED = 3000;

class KeyList {
  constructor(root, rows, onSelect) {
    this.rows = rows;
    this.review = rows.review;
    this.onSelect = onSelect;
    this.port = root.querySelector(".am-port");
    this.sheet = root.querySelector(".am-sheet");
    this.uid = this.port.id;
    this.at = -1;
    this.entries = [];
    this.port.addEventListener("scroll", () => this.draw(), { passive: true });
    this.sheet.addEventListener("click", (event) => {
      const row = event.target.closest("[data-at]");
      if (row) this.select(Number(row.dataset.at), { toggle: true });
    });
    const lengths = this.review.sides.flatMap((side) => side.keys.map((key) => key.length)).sort((a, b) => a - b);
    this.typical = lengths[Math.floor(lengths.length * 0.9)] || 0;
    new ResizeObserver(() => this.lay()).observe(this.port);
  }

  // Keys too long to stand side by side stand one above the other.
  lay() {
    const room = (this.port.clientWidth - FIXED_COLUMNS) / 2 / CHARACTER;
    this.port.classList.toggle("stacked", this.typical > room);
    this.draw(true);
  }

  rebuild(keep = true) {
    const before = this.entries[this.at];
    this.entries = this.rows.entries();
    this.at =
      keep && before ? this.entries.findIndex((e) => e.row === before.row && (e.row !== undefined || e.group === before.group)) : -1;
    if (!keep) this.port.scrollTop = 0;
    this.port.setAttribute("aria-rowcount", this.entries.length + 1);
    this.draw(true);
  }

  draw(force = false) {
    const height = (this.height = parseFloat(getComputedStyle(this.port).getPropertyValue("--row")) || 32);
    const stacked = this.port.classList.contains("stacked");
    const first = this.printing ? 0 : Math.max(0, Math.floor(this.port.scrollTop / height) - OVERSCAN);
    const last = this.printing
      ? Math.min(this.entries.length, MAX_PRINTED)
      : Math.min(this.entries.length, Math.ceil((this.port.scrollTop + this.port.clientHeight) / height) + OVERSCAN);
    if (!force && first === this.first && last === this.last) return;
    [this.first, this.last] = [first, last];
    this.sheet.style.height = `${this.entries.length * height}px`;
    this.port.style.height = this.printing ? "auto" : `min(74vh, 760px, ${Math.max(this.entries.length, 5) * height + (stacked ? 2 : HEAD)}px)`;
    const shown = [];
    for (let at = first; at < last; at++) shown.push(this.element(at));
    this.sheet.replaceChildren(...shown);
    const selected = this.at >= first && this.at < last;
    if (selected) this.port.setAttribute("aria-activedescendant", `${this.uid}-${this.at}`);
    else this.port.removeAttribute("aria-activedescendant");
  }

  element(at) {
    const entry = this.entries[at];
    const element = entry.row === undefined ? this.groupElement(entry) : this.rowElement(entry.row);
    const attributes = {
      role: "row",
      id: `${this.uid}-${at}`,
      "aria-rowindex": at + 2,
      "data-at": at,
      "aria-selected": String(at === this.at),
    };
    if (this.rows.sort === "rule") attributes["aria-level"] = entry.row === undefined ? 1 : 2;
    if (entry.row === undefined) attributes["aria-expanded"] = String(entry.open);
    fill(element, attributes, []);
    element.style.top = `${at * this.height}px`;
    return element;
  }

  groupElement({ pattern, replacement, words, where, label, rows, open, confidence, nOpen }) {
    const cell = { role: "gridcell" };
    const facts = [words, where].filter(Boolean).join("; ");
    const key = (text) => ({ ...cell, title: short(text, 2000) });
    return h(
      `div.am-row.am-group${open ? ".open" : ""}${label ? ".am-rest" : ""}`,
      null,
      h("span.mark", cell, h("span", { "aria-hidden": "true" }, open ? "▾" : "▸")),
      h("span.from", key(label || pattern), keyElement(label || pattern)),
      h("span.arrow", cell, label ? "" : "→"),
      h("span.to", key(replacement || ""), label ? null : keyElement(pattern === replacement ? "same key" : replacement)),
      h("span.shape", { ...cell, title: facts }, counted(rows.length, "key"), facts ? h("span.words", null, facts) : null),
      h("span.spark", cell),
      h(
        "span.sure",
        { ...cell, title: nOpen ? `${counted(nOpen, "key")} to review` : null },
        confidence === null ? "" : this.meter(confidence, nOpen > 0),
      ),
    );
  }

  rowElement(row) {
    const { review, rows } = this;
    const target = rows.isTarget(row);
    const now = target ? review.current(row) : null;
    const state = stateOf(review, rows, row, now);
    const cell = { role: "gridcell" };
    const sourceKeys = now
      ? now.sources.map((place) => review.source.keys[place])
      : target
        ? []
        : [review.source.keys[row - rows.nTargets]];
    const targetKey = target ? review.target.keys[row] : null;
    return h(
      `div.am-row.is-${state.name}`,
      null,
      h(
        "span.mark",
        { ...cell, title: state.words },
        h("span.glyph", { "aria-hidden": "true" }, state.glyph),
        h("span.hidden", null, state.words),
      ),
      h("span.from", cell, this.keys(sourceKeys, targetKey), sourceKeys.length ? null : h("i", null, "nothing feeds it")),
      h("span.arrow", cell, target ? "→" : ""),
      h("span.to", cell, targetKey === null ? h("i", null, "feeds nothing") : this.keys([targetKey], sourceKeys.join("."))),
      h("span.shape", cell, shapesOf(review, rows, row, now), now ? this.words(now.transform) : null),
      h("span.spark", cell, now ? this.spark(row, now) : null),
      h("span.sure", cell, now ? this.meter(now.confidence, review.isOpen(row), now.decided) : h("span.note", null, state.short)),
    );
  }

  keys(keys, others) {
    const words = others === null ? null : new Set(short(others, 4000).split("."));
    const [first, ...rest] = keys;
    if (first === undefined) return null;
    return [
      keyElement(first, words),
      rest.length ? h("span.more", { title: rest.map((key) => short(key)).join("\n") }, `+${rest.length}`) : null,
    ];
  }

  // The evidence as five small bars.
  spark(target, now) {
    const values = this.review.evidence(target, now);
    if (!values) return null;
    const text = SIGNALS.map((signal, i) => `${signal} ${typeof values[i] === "number" ? values[i].toFixed(2) : "not measured"}`).join(
      ", ",
    );
    const bars = values.map((value, i) => svg("rect", { x: i * 7, width: 5, y: 18 - (value || 0) * 18, height: (value || 0) * 18 + 1 }));
    return [svg("svg", { viewBox: "0 0 33 19", "aria-hidden": "true" }, bars), h("span.hidden", null, text)];
  }

  words(transform) {
    const words = this.review.transforms[transform][1];
    const first = (step) => step.split(" ")[0].replace("entries", "slice");
    return words ? h("span.words", { title: words }, words.split(", then ").map(first).join(", ")) : null;
  }

  meter(confidence, open, decided = false) {
    const band = decided ? "decided" : !open ? "sure" : confidence >= 0.5 ? "uncertain" : "weak";
    const bar = h("span.fill", null);
    bar.style.width = `${Math.round(confidence * 100)}%`;
    return [h(`span.meter.${band}`, { "aria-hidden": "true" }, bar), h("span.value", null, decided ? "decided" : percent(confidence))];
  }

  select(at, { toggle = false } = {}) {
    if (at < 0 || at >= this.entries.length) return;
    const entry = this.entries[at];
    this.at = at;
    if (toggle && entry.row === undefined) return this.fold(entry, entry.open);
    const top = at * this.height;
    const room = this.port.clientHeight - this.height;
    if (top < this.port.scrollTop) this.port.scrollTop = top;
    else if (top > this.port.scrollTop + room) this.port.scrollTop = top - room;
    this.draw(true);
    this.onSelect(entry);
  }

  fold(entry, folded) {
    this.rows.folded.set(entry.group, folded);
    this.rebuild();
    this.onSelect(this.entries[this.at]);
  }

  // On paper there is no scrolling: every row, as far as that is reasonable.
  printAll(on) {
    this.printing = on;
    this.rows.unfoldAll = on && this.rows.all.length <= MAX_PRINTED;
    this.rebuild();
  }

  move(step) {
    this.select(Math.min(Math.max(this.at + step, 0), this.entries.length - 1));
  }

  get selected() {
    return this.entries[this.at];
  }
}

function stateOf(review, rows, row, now) {
  if (!rows.isTarget(row)) {
    const reason = review.harmless[0].get(row - rows.nTargets);
    return reason
      ? { name: "harmless", glyph: "○", words: `unexpected, harmless: ${reason}`, short: "harmless" }
      : { name: "lost", glyph: "◌", words: "unexpected: feeds nothing", short: "unused" };
  }
  if (now === null) {
    if (review.decisions.has(row) || review.answered.has(row))
      return { name: "rejected", glyph: "✕", words: "rejected: nothing feeds it", short: "rejected" };
    const reason = review.harmless[1].get(row);
    return reason
      ? { name: "harmless", glyph: "○", words: `missing, harmless: ${reason}`, short: "harmless" }
      : { name: "lost", glyph: "!", words: "missing: nothing feeds it", short: "missing" };
  }
  if (now.decided) return { name: "decided", glyph: "✓", words: "decided by a person", short: "" };
  return review.isOpen(row)
    ? { name: "open", glyph: "?", words: "to review", short: "" }
    : { name: "ok", glyph: "·", words: "confident", short: "" };
}

function shapesOf(review, rows, row, now) {
  if (!rows.isTarget(row)) return shapeText(review.shape(0, row - rows.nTargets));
  const after = shapeText(review.shape(1, row));
  if (!now) return after;
  const befores = new Map();
  for (const source of now.sources) {
    const text = shapeText(review.shape(0, source));
    befores.set(text, (befores.get(text) || 0) + 1);
  }
  const before = [...befores].map(([text, n]) => (n > 1 ? `${n} of ${text}` : text)).join(" + ");
  return before === after ? after : `${before} → ${after}`;
}
