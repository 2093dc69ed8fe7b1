// The mapping as the page holds it: what was proposed, what a person decided, and the two as one.
function decodeKeys(coded) {
  const keys = new Array(coded.length / 2);
  let previous = "";
  for (let i = 0; i < keys.length; i++) previous = keys[i] = previous.slice(0, coded[2 * i]) + coded[2 * i + 1];
  return keys;
}

const listed = (places) => (typeof places === "number" ? [places] : places);
const sameList = (a, b) => a.length === b.length && a.every((value, i) => value === b[i]);

// The places of keys that are one tensor, in order.
function tiesOf({ alias }) {
  const groups = new Map();
  for (const [place, first] of Object.entries(alias)) {
    if (first >= 0) groups.set(first, [...(groups.get(first) || [first]), Number(place)]);
  }
  return [...groups.values()].map((places) => places.sort((a, b) => a - b));
}

class Review {
  constructor(data) {
    this.data = data;
    this.sides = data.sides.map((side) => ({ ...side, keys: decodeKeys(side.keys) }));
    [this.source, this.target] = this.sides;
    this.transforms = data.transforms.slice();
    this.matchAt = new Int32Array(this.target.keys.length).fill(-1);
    data.matches.target.forEach((target, i) => (this.matchAt[target] = i));
    this.wasDecided = new Set(data.matches.decided);
    this.reasons = data.harmless.map((groups) => new Map(groups.flatMap(([reason, places]) => places.map((place) => [place, reason]))));
    this.ties = this.sides.map((side) => tiesOf(side));
    this.decisions = new Map();
    this.answers = new Map();
    this.refresh();
  }

  shape(side, place) {
    const at = this.sides[side].shape[place];
    return at === undefined ? null : this.data.shapes[at];
  }

  word(side, field, place) {
    const at = this.sides[side][field][place];
    return at === undefined ? null : this.data.words[at];
  }

  // What was proposed for a model key, or null.
  proposed(target) {
    const i = this.matchAt[target];
    if (i < 0) return null;
    const m = this.data.matches;
    const decided = this.wasDecided.has(i);
    return { sources: listed(m.sources[i]), transform: m.transform[i], confidence: m.confidence[i], decided, group: m.group[i], at: i };
  }

  // What holds for a model key now, or null.
  current(target) {
    const decision = this.decisions.get(target) || this.answered.get(target);
    if (!decision) return this.proposed(target);
    if (!decision.sources) return null;
    return { at: this.matchAt[target], group: this.groupOf(target), ...decision, confidence: 1, decided: true };
  }

  groupOf(target) {
    return this.matchAt[target] < 0 ? -1 : this.data.matches.group[this.matchAt[target]];
  }

  isOpen(target) {
    const now = this.current(target);
    return (
      now !== null && !now.decided && (now.confidence < this.data.threshold || this.pending.has(target) || this.invents(now.transform))
    );
  }

  invents(place) {
    const data = this.transforms[place][0];
    return (data.steps || [data]).some((step) => step.op === "adapt");
  }

  // Whether something else holds than was proposed.
  isOther(target, now = this.current(target)) {
    const before = this.proposed(target);
    return !now || !before || !sameList(before.sources, now.sources) || before.transform !== now.transform;
  }

  // The measured signals (null where not measured) behind what holds now, or null where a person chose something else.
  evidence(target, now) {
    return this.isOther(target, now) ? null : this.data.matches.evidence[this.matchAt[target]];
  }

  alternatives(target) {
    const found = this.data.matches.alternatives[this.matchAt[target]] || [];
    return found.map(([sources, transform, confidence]) => ({ sources: listed(sources), transform, confidence }));
  }

  // Recompute what the answers imply and which checkpoint keys are used.
  refresh() {
    const open = this.data.questions.filter((_, place) => !this.answers.has(place));
    this.pending = new Set(open.flatMap((question) => question.keys));
    this.answered = new Map();
    for (const [place, option] of this.answers) {
      const question = this.data.questions[place];
      for (const target of question.keys) this.answered.set(target, { sources: null });
      for (const [target, sources, transform] of question.options[option].matches) {
        this.answered.set(target, { sources: listed(sources), transform });
      }
    }
    this.used = new Uint8Array(this.source.keys.length);
    for (let target = 0; target < this.target.keys.length; target++) {
      const now = this.current(target);
      if (now) for (const source of now.sources) this.used[source] = 1;
    }
    this.harmless = [this.harmlessOf(0, (s) => this.used[s], "which is used"), this.harmlessOf(1, (t) => this.current(t), "which is fed")];
  }

  // Why keys that are left over do no harm: what they are, or that a key with the same tensor is not left over.
  harmlessOf(side, isDone, state) {
    const found = new Map();
    for (const [place, reason] of this.reasons[side]) if (!isDone(place)) found.set(place, reason);
    for (const places of this.ties[side]) {
      const done = places.find(isDone);
      if (done === undefined) continue;
      const reason = `tied to ${short(this.sides[side].keys[done], 120)}, ${state}`;
      for (const place of places) if (!isDone(place)) found.set(place, reason);
    }
    return found;
  }

  transformPlace(step) {
    const name = JSON.stringify(step);
    const found = this.transforms.findIndex(([data]) => JSON.stringify(data) === name);
    if (found >= 0) return found;
    const words = { copy: "", permute: "transpose", reshape: `reshape to ${shapeText(step.shape || [])}` }[step.op];
    return this.transforms.push([step, words]) - 1;
  }

  // The ways in which one checkpoint key could feed a model key without inventing a value.
  conversions(source, target) {
    const before = this.shape(0, source);
    const after = this.shape(1, target);
    if (before === null || after === null) return [{ op: "copy" }];
    const found = [];
    if (sameList(before, after)) found.push({ op: "copy" });
    if (before.length === 2 && sameList([before[1], before[0]], after)) found.push({ op: "permute", dims: [1, 0] });
    const size = (shape) => shape.reduce((a, b) => a * b, 1);
    if (!sameList(before, after) && size(before) === size(after)) found.push({ op: "reshape", shape: after });
    return found;
  }

  accept(target) {
    const now = this.current(target);
    if (now) this.decide(target, { sources: now.sources, transform: now.transform });
    return now !== null;
  }

  decide(target, decision) {
    this.decisions.set(target, decision);
  }

  // Answers and decisions in the form that `automatch.report.decisions` takes.
  payload() {
    const keys = (places) => places && places.map((place) => this.source.keys[place]);
    return {
      answers: [...this.answers].map(([place, option]) => [this.data.questions[place].id, option]),
      decisions: [...this.decisions].map(([target, { sources, transform }]) => [
        this.target.keys[target],
        keys(sources),
        sources ? this.transforms[transform][0] : null,
      ]),
    };
  }

  // The inverse of payload(); whatever no longer fits this mapping is left out.
  restore({ answers = [], decisions = [] }) {
    const questions = new Map(this.data.questions.map((question, place) => [question.id, place]));
    const places = this.sides.map((side) => new Map(side.keys.map((key, place) => [key, place])));
    for (const [id, option] of answers) {
      const place = questions.get(id);
      if (place !== undefined && this.data.questions[place].options[option]) this.answers.set(place, option);
    }
    for (const [key, sources, step] of decisions) {
      const target = places[1].get(key);
      const found = sources && sources.map((source) => places[0].get(source));
      if (target === undefined || (found && found.includes(undefined))) continue;
      this.decide(target, found ? { sources: found, transform: this.transformPlace(step) } : { sources: null });
    }
    this.refresh();
  }
}
