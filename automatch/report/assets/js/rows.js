// Which rows there are: filtered, searched, sorted and put under their rules. A row is a number: the place of a
// model key, or, for a checkpoint key that feeds nothing, its place after all model keys.
const FILTERS = {
  all: "All",
  open: "To review",
  converted: "Converted",
  resized: "Resized",
  unmatched: "Unmatched",
  same: "Same key",
  decided: "Decided",
};
const FILTER_NAMES = Object.keys(FILTERS);
const SORTS = { rule: "by rule", sure: "least sure first", model: "model order", checkpoint: "checkpoint order", key: "by key" };
const LABELS = [
  "Decided otherwise than proposed",
  "Missing: nothing feeds them",
  "Missing but harmless",
  "Unexpected: they feed nothing",
  "Unexpected but harmless",
];
const UNFOLDED_ROWS = 40;

class Rows {
  constructor(review) {
    this.review = review;
    this.folded = new Map();
    this.filter = "all";
    this.sort = "rule";
    this.search = "";
    this.nTargets = review.target.keys.length;
    this.lower = review.sides.map((side) => side.keys.map((key) => key.toLowerCase()));
    this.texts = [];
    this.touched = [];
    this.refresh();
    setTimeout(() => this.all.forEach((row) => this.text(row)), 50);
  }

  isTarget(row) {
    return row < this.nTargets;
  }

  universe() {
    const rows = Array.from({ length: this.nTargets }, (_, t) => t);
    this.review.used.forEach((used, source) => used || rows.push(this.nTargets + source));
    return rows;
  }

  text(row) {
    if (this.texts[row] === undefined) {
      const now = this.isTarget(row) ? this.review.current(row) : null;
      const sources = now ? now.sources.map((place) => this.lower[0][place]).join(" ") : "";
      this.texts[row] = this.isTarget(row) ? `${this.lower[1][row]} ${sources}` : this.lower[0][row - this.nTargets];
    }
    return this.texts[row];
  }

  // One number per row: bit i says whether it belongs to the i-th filter.
  refresh() {
    const { decisions, answered } = this.review;
    for (const row of this.touched) delete this.texts[row];
    this.touched = [...decisions.keys(), ...answered.keys()];
    for (const row of this.touched) delete this.texts[row];
    this.all = this.universe();
    this.flags = Uint8Array.from(this.all, (row) => this.flagsOf(row));
  }

  flagsOf(row) {
    const { review } = this;
    const bits = (...names) => names.reduce((sum, name) => sum | (1 << FILTER_NAMES.indexOf(name)), 1);
    if (!this.isTarget(row)) return bits("unmatched");
    const now = review.current(row);
    if (now === null) return review.decisions.has(row) || review.answered.has(row) ? bits("unmatched", "decided") : bits("unmatched");
    const names = [];
    if (now.decided) names.push("decided");
    else if (review.isOpen(row)) names.push("open");
    if (review.invents(now.transform)) names.push("resized");
    else if (review.transforms[now.transform][0].op !== "copy") names.push("converted");
    if (now.sources.length === 1 && review.source.keys[now.sources[0]] === review.target.keys[row]) names.push("same");
    return bits(...names);
  }

  counts() {
    const found = FILTER_NAMES.map(() => 0);
    for (const flags of this.flags) for (let i = 0; i < found.length; i++) found[i] += (flags >> i) & 1;
    return Object.fromEntries(FILTER_NAMES.map((name, i) => [name, found[i]]));
  }

  // The entries to show: {row} and, under rules, {group, rows, label, …} before their rows.
  entries() {
    const terms = this.search.toLowerCase().split(/\s+/).filter(Boolean);
    const bit = 1 << FILTER_NAMES.indexOf(this.filter);
    const rows = this.all.filter((row, i) => this.flags[i] & bit && terms.every((term) => this.text(row).includes(term)));
    this.shown = rows;
    return this.sort === "rule" ? this.grouped(rows) : this.sorted(rows).map((row) => ({ row }));
  }

  sorted(rows) {
    if (this.sort === "model") return rows;
    const key = {
      sure: (row) => this.confidence(row),
      checkpoint: (row) => (this.isTarget(row) ? (this.review.current(row)?.sources[0] ?? Infinity) : row - this.nTargets),
      key: (row) => row,
    }[this.sort];
    const values = new Map(rows.map((row) => [row, this.sort === "key" ? this.text(row) : key(row)]));
    return rows.slice().sort((a, b) => (values.get(a) < values.get(b) ? -1 : values.get(a) > values.get(b) ? 1 : a - b));
  }

  confidence(row) {
    const now = this.isTarget(row) ? this.review.current(row) : null;
    return now ? now.confidence : 2;
  }

  groupOf(row) {
    const { review } = this;
    const rules = review.data.groups.length;
    if (!this.isTarget(row)) return rules + (review.harmless[0].has(row - this.nTargets) ? 4 : 3);
    if (review.current(row) === null) return rules + (review.harmless[1].has(row) ? 2 : 1);
    const group = review.groupOf(row);
    return group < 0 || review.isOther(row) ? rules : group;
  }

  grouped(rows) {
    const groups = new Map();
    for (const row of rows) {
      const group = this.groupOf(row);
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(row);
    }
    const unfolded = this.filter !== "all" || this.search !== "" || rows.length <= UNFOLDED_ROWS;
    const entries = [];
    for (const group of [...groups.keys()].sort((a, b) => a - b)) {
      const members = groups.get(group);
      const open = this.unfoldAll || (this.folded.has(group) ? !this.folded.get(group) : unfolded);
      entries.push({ group, rows: members, open, ...this.describe(group, members) });
      if (open) for (const row of members) entries.push({ row, group });
    }
    return entries;
  }

  describe(group, rows) {
    const rules = this.review.data.groups;
    if (group >= rules.length) return { label: LABELS[group - rules.length], confidence: group > rules.length ? null : 1, nOpen: 0 };
    let least = 1;
    let nOpen = 0;
    for (const row of rows) {
      least = Math.min(least, this.review.current(row).confidence);
      if (this.review.isOpen(row)) nOpen++;
    }
    const [pattern, replacement, words, where] = rules[group];
    return { pattern, replacement, words, where, confidence: least, nOpen };
  }
}
