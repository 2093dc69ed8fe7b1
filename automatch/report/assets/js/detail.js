// Everything about the selected row, and the ways to decide it.
const MAX_CHOICES = 40;

class Detail {
  constructor(root, rows, act) {
    this.rows = rows;
    this.review = rows.review;
    this.act = act;
    this.box = root.querySelector(".am-detail");
    this.show(null);
  }

  show(entry) {
    this.entry = entry;
    this.box.classList.toggle("empty", !entry);
    if (!entry)
      return this.box.replaceChildren(
        h(
          "p.soft",
          null,
          "Choose a row to see its evidence, its runners-up and to decide it. Keys: j and k move, a accepts, r rejects, u takes back, / searches.",
        ),
      );
    const parts =
      entry.row === undefined ? this.ofGroup(entry) : this.rows.isTarget(entry.row) ? this.ofTarget(entry.row) : this.ofLeftover(entry.row);
    const close = h("button.quiet.close", { type: "button", "aria-label": "Close details", onclick: () => this.show(null) }, "×");
    this.box.replaceChildren(close, ...parts.filter(Boolean));
    this.box.scrollTop = 0;
  }

  ofGroup({ label, pattern, replacement, words, where, rows, nOpen, confidence }) {
    const title = label ? h("h3", null, label) : [h("p.mono", null, atDots(pattern)), h("p.mono.to", null, "→ ", h("b", null, atDots(replacement)))];
    const buttons =
      confidence === null
        ? null
        : h(
            "p.buttons",
            null,
            this.button("Accept all", "a", () => this.act("accept"), "primary"),
            this.button("Reject all", "r", () => this.act("reject")),
            this.button("Take back", "u", () => this.act("undo")),
          );
    const facts =
      confidence === null
        ? null
        : h("p.soft", null, `${nOpen ? counted(nOpen, "key") + " to review. " : ""}Least sure: ${percent(confidence)}.`);
    const first = this.rows.isTarget(rows[0])
      ? this.review.harmless[1].get(rows[0])
      : this.review.harmless[0].get(rows[0] - this.rows.nTargets);
    const why = confidence === null && first ? h("p.soft", null, `Harmless: ${first}.`) : null;
    return [
      h("p.kind", null, label ? "Left over" : "Rule"),
      ...[title].flat(),
      h("p", null, counted(rows.length, "key")),
      words ? h("p", null, words) : null,
      where ? h("p.soft", null, where) : null,
      facts,
      why,
      buttons,
    ];
  }

  ofTarget(target) {
    const { review } = this;
    const now = review.current(target);
    const state = stateOf(review, this.rows, target, now);
    const sources = now ? now.sources : [];
    const touched = review.decisions.has(target) || review.answered.has(target);
    return [
      h(`p.kind.is-${state.name}`, null, state.words),
      h("p.mono.to", null, atDots(short(review.target.keys[target], 600))),
      this.tensor(1, target),
      sources.length ? h("p.soft", null, sources.length > 1 ? `fed by ${sources.length} checkpoint keys` : "fed by") : null,
      ...sources.slice(0, 12).flatMap((source) => [h("p.mono", null, atDots(short(review.source.keys[source], 600))), this.tensor(0, source)]),
      sources.length > 12 ? h("p.soft", null, `… and ${sources.length - 12} more`) : null,
      now && review.transforms[now.transform][1] ? h("p", null, "Transform: ", review.transforms[now.transform][1]) : null,
      now && !now.decided ? h("p", null, "Confidence: ", h("b", null, percent(now.confidence))) : null,
      h(
        "p.buttons",
        null,
        now ? this.button("Accept", "a", () => this.act("accept"), "primary") : null,
        now ? this.button("Reject", "r", () => this.act("reject")) : null,
        touched ? this.button("Take back", "u", () => this.act("undo")) : null,
      ),
      this.evidence(target, now),
      this.runnersUp(target, now),
      this.repoint(target),
    ];
  }

  ofLeftover(row) {
    const source = row - this.rows.nTargets;
    const state = stateOf(this.review, this.rows, row, null);
    return [
      h(`p.kind.is-${state.name}`, null, state.words),
      h("p.mono", null, atDots(short(this.review.source.keys[source], 600))),
      this.tensor(0, source),
      h("p.soft", null, "To use it, choose the model key that it should feed and point that at it."),
    ];
  }

  tensor(side, place) {
    const kind = this.review.word(side, "kind", place);
    const facts = [
      shapeText(this.review.shape(side, place)),
      this.review.word(side, "dtype", place),
      kind,
      this.review.word(side, "owner", place),
    ];
    return h(
      "p.facts",
      null,
      facts
        .filter(Boolean)
        .map((fact) => short(fact, 80))
        .join(" · "),
    );
  }

  button(words, key, onclick, kind = "quiet") {
    return h(`button.${kind}`, { type: "button", onclick, "aria-keyshortcuts": key }, words, h("kbd", { "aria-hidden": "true" }, key));
  }

  evidence(target, now) {
    const values = this.review.evidence(target, now);
    if (!values) return null;
    const bars = SIGNALS.map((signal, i) => {
      const value = values[i];
      const bar = h("span.fill", null);
      bar.style.width = `${Math.round((value || 0) * 100)}%`;
      const measured = value !== null && value !== undefined;
      return h(
        "li",
        null,
        h("span", null, signal),
        measured ? h("span.meter.plain", { "aria-hidden": "true" }, bar) : h("span.soft", null, "not measured"),
        h("span.value", null, measured ? value.toFixed(2) : ""),
      );
    });
    return h("section", { "aria-label": "Evidence" }, h("h3", null, "Evidence"), h("ul.bars", null, bars));
  }

  runnersUp(target, now) {
    const proposed = this.review.proposed(target);
    const all = proposed ? [proposed, ...this.review.alternatives(target)] : [];
    const others = all.filter((a) => !now || !sameList(a.sources, now.sources) || a.transform !== now.transform);
    if (!others.length) return null;
    const items = others.map(({ sources, transform, confidence }) => {
      const words = this.review.transforms[transform][1];
      const label = sources.map((source) => short(this.review.source.keys[source], 120)).join(" + ");
      return h(
        "li",
        null,
        h(
          "button.choice",
          { type: "button", onclick: () => this.act("point", { sources, transform }) },
          h("span.mono", null, atDots(label)),
          words ? h("span.words", null, words) : null,
        ),
        h("span.value", null, percent(confidence)),
      );
    });
    return h("section", { "aria-label": "Runners-up" }, h("h3", null, "Runners-up"), h("ul.choices", null, items));
  }

  repoint(target) {
    const list = h("ul.choices", null);
    const input = h("input", {
      type: "search",
      "aria-label": "Point at another checkpoint key",
      placeholder: "checkpoint key …",
      autocomplete: "off",
      spellcheck: "false",
      class: "repoint",
      oninput: () => this.choices(target, input.value, list),
    });
    const section = h(
      "details",
      { ontoggle: () => section.open && this.choices(target, input.value, list) },
      h("summary", null, "Point at another key"),
      input,
      list,
    );
    return section;
  }

  choices(target, text, list) {
    const { review } = this;
    const terms = text.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    const now = review.current(target);
    for (const pass of [0, 1]) {
      for (let source = 0; source < review.source.keys.length && found.length < MAX_CHOICES; source++) {
        if (review.used[source] !== pass || (now && now.sources.includes(source))) continue;
        if (!terms.every((term) => this.rows.lower[0][source].includes(term))) continue;
        for (const step of review.conversions(source, target)) found.push([source, step, pass]);
      }
    }
    const items = found.map(([source, step, used]) => {
      const words = [step.op === "copy" ? "" : step.op === "permute" ? "transpose" : step.op, used ? "feeds another key" : "unused"]
        .filter(Boolean)
        .join(", ");
      const onclick = () => this.act("point", { sources: [source], transform: review.transformPlace(step) });
      return h(
        "li",
        null,
        h(
          "button.choice",
          { type: "button", onclick },
          h("span.mono", null, atDots(short(review.source.keys[source], 120))),
          h("span.words", null, words),
        ),
      );
    });
    list.replaceChildren(...(items.length ? items : [h("li.soft", null, "No key of a fitting shape.")]));
  }
}
