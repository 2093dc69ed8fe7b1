// One review: the static page that the template wrote, made live.
class App {
  constructor(root, data, host) {
    this.root = root;
    this.host = host;
    this.review = new Review(data);
    this.remember(host.restore());
    this.rows = new Rows(this.review);
    this.list = new KeyList(root, this.rows, (entry) => this.detail.show(entry));
    this.detail = new Detail(root, this.rows, (what, decision) => this.act(what, decision));
    this.find = (selector) => root.querySelector(selector);
    this.glance = new Glance(root, this.review);
    this.bindTools();
    this.bindQuestions();
    this.list.rebuild(false);
    this.update(false);
    root.addEventListener("keydown", (event) => this.onKey(event));
    this.drawTangleSoon();
    if (this.review.decisions.size + this.review.answers.size) this.say("What you decided last time is back");
  }

  // Decisions of an earlier visit; what cannot be read is forgotten.
  remember(payload) {
    try {
      this.review.restore(payload);
    } catch {
      this.review.decisions.clear();
      this.review.answers.clear();
      this.review.refresh();
    }
  }

  // The picture waits until the page has been painted.
  drawTangleSoon() {
    const draw = () => {
      this.tangle = new Tangle(this.root, this.review, (path) => this.searchFor(path));
      this.find(".am-tangle").classList.add("ready");
    };
    requestAnimationFrame(() => setTimeout(draw, 0));
  }

  bindTools() {
    const search = this.find(".am-search");
    search.addEventListener("input", () => this.searchFor(search.value, false));
    const chips = this.find(".am-filters");
    for (const [name, words] of Object.entries(FILTERS)) {
      const onclick = () => this.filterBy(name);
      chips.append(
        h(
          "button.chip",
          { type: "button", "data-filter": name, "aria-pressed": String(name === "all"), onclick },
          words,
          " ",
          h("span.n", null),
        ),
      );
    }
    const sort = this.find(".am-sort");
    for (const [name, words] of Object.entries(SORTS)) sort.append(h("option", { value: name }, words));
    sort.addEventListener("change", () => {
      this.rows.sort = sort.value;
      this.list.rebuild(false);
    });
    this.find(".am-save").addEventListener("click", () => this.save());
    this.find(".am-clear").addEventListener("click", () => this.clear());
    const theme = this.find(".am-theme");
    if (theme) theme.addEventListener("click", () => this.host.theme(theme));
    for (const button of this.root.querySelectorAll("[data-show]")) {
      button.addEventListener("click", () => {
        this.filterBy(button.dataset.show);
        this.find(".am-keys").scrollIntoView({ block: "start" });
      });
    }
  }

  bindQuestions() {
    this.radios = [...this.root.querySelectorAll("input[data-question]")];
    const view = (App.views = (App.views || 0) + 1); // a notebook may show one review twice: each has radios of its own
    for (const radio of this.radios) radio.name += `-${view}`;
    for (const radio of this.radios) {
      radio.addEventListener("change", () => {
        const question = Number(radio.dataset.question);
        const option = Number(radio.value);
        if (option < 0) this.review.answers.delete(question);
        else this.review.answers.set(question, option);
        for (const target of this.review.data.questions[question].keys) this.review.decisions.delete(target);
        this.changed(
          option < 0 ? "Question left open" : `Answered: ${counted(this.review.data.questions[question].keys.length, "key")} settled`,
        );
      });
    }
  }

  filterBy(name) {
    this.rows.filter = name;
    for (const chip of this.root.querySelectorAll(".chip")) chip.setAttribute("aria-pressed", String(chip.dataset.filter === name));
    this.rows.folded.clear();
    this.list.rebuild(false);
    this.say(`${counted(this.rows.shown.length, "key")} shown`);
  }

  searchFor(text, fill = true) {
    if (fill) this.find(".am-search").value = text;
    this.rows.search = text;
    this.list.rebuild(false);
    this.find(".am-shown").textContent = text ? `${counted(this.rows.shown.length, "key")} found` : "";
  }

  act(what, decision) {
    const entry = this.list.selected;
    if (!entry) return;
    const { review, rows } = this;
    const chosen = entry.row === undefined ? entry.rows : [entry.row];
    const targets = chosen.filter((row) => rows.isTarget(row));
    const done = targets.filter((target) => {
      if (what === "undo") return review.decisions.delete(target);
      if (what === "point") review.decide(target, decision);
      else if (review.current(target) === null) return false;
      else if (what === "reject") review.decide(target, { sources: null });
      else review.accept(target);
      return true;
    });
    const words = { accept: "accepted", reject: "rejected", point: "pointed at another key", undo: "taken back" }[what];
    this.changed(done.length ? `${counted(done.length, "key")} ${words}` : "Nothing to change here");
  }

  changed(words) {
    this.redraw();
    this.update(true);
    this.say(words);
  }

  redraw() {
    this.review.refresh();
    this.rows.refresh();
    const selected = this.list.selected;
    this.list.rebuild();
    if (this.list.at < 0 && selected) this.list.at = Math.min(this.lastAt ?? 0, this.list.entries.length - 1);
    this.detail.show(this.list.selected || null);
    this.list.draw(true);
  }

  update(changed) {
    const { review } = this;
    const counts = this.rows.counts();
    for (const chip of this.root.querySelectorAll(".chip")) chip.lastChild.textContent = thousands(counts[chip.dataset.filter]);
    const settled = review.answers.size;
    const total = review.decisions.size + settled;
    this.find(".am-state").textContent = total
      ? `${settled ? counted(settled, "answer") + ", " : ""}${counted(review.decisions.size, "decision")}`
      : "No decisions yet";
    this.find(".am-open").textContent = this.whatIsOpen(counts);
    this.find(".am-clear").hidden = total === 0;
    for (const radio of this.radios) radio.checked = (review.answers.get(Number(radio.dataset.question)) ?? -1) === Number(radio.value);
    this.glance.draw();
    if (changed) {
      if (this.tangle) this.tangle.draw();
      this.host.changed(review.payload());
    }
  }

  whatIsOpen(counts) {
    if (counts.open) return `${counted(counts.open, "key")} to review`;
    const { review, rows } = this;
    let missing = 0;
    for (let target = 0; target < rows.nTargets; target++) missing += !review.current(target) && !review.harmless[1].has(target);
    return missing ? `${counted(missing, "key")} not fed` : "Nothing left to review";
  }

  // Decisions that came from outside, e.g. from Python or another view.
  restore(payload) {
    if (JSON.stringify(payload) === JSON.stringify(this.review.payload())) return;
    this.review.decisions.clear();
    this.review.answers.clear();
    this.remember(payload);
    this.redraw();
    this.update(false);
    if (this.tangle) this.tangle.draw();
  }

  clear() {
    this.review.decisions.clear();
    this.review.answers.clear();
    this.changed("All decisions taken back");
  }

  async save() {
    try {
      this.say(await this.host.save(this.review));
    } catch (error) {
      this.say(`Not saved: ${error.message}`);
    }
  }

  say(words) {
    this.find(".am-said").textContent = words;
  }

  onKey(event) {
    const typing = event.target.closest("input:not([type=radio]):not([type=checkbox]), select, textarea");
    const single = event.key.length === 1 && event.key !== " ";
    if (single && !this.find(".am-shortcuts input").checked) return;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (typing) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const onButton = event.target.closest("button, summary, a") && ["Enter", " "].includes(event.key);
    const inPort = this.find(".am-port").contains(event.target);
    const action = onButton ? null : this.keyAction(event.key, inPort);
    if (!action) return;
    event.preventDefault();
    action();
  }

  keyAction(key, inPort) {
    const { list } = this;
    const entry = list.selected;
    const group = entry && entry.row === undefined;
    const decide = (what) => () => {
      this.lastAt = list.at;
      this.act(what);
      if (what !== "undo" && list.selected && list.selected.row === entry?.row && !group) list.move(1);
    };
    const step = (by) => () => {
      list.port.focus({ preventScroll: true });
      list.move(by);
    };
    const always = {
      j: step(1),
      k: step(-1),
      a: decide("accept"),
      r: decide("reject"),
      u: decide("undo"),
      "/": () => this.find(".am-search").focus(),
    };
    if (always[key] || !inPort) return always[key];
    const page = Math.max(1, Math.floor(list.port.clientHeight / list.height) - 1);
    return {
      ArrowDown: always.j,
      ArrowUp: always.k,
      PageDown: () => list.move(page),
      PageUp: () => list.move(-page),
      Home: () => list.select(0),
      End: () => list.select(list.entries.length - 1),
      ArrowRight: group && !entry.open ? () => list.fold(entry, false) : undefined,
      ArrowLeft: group && entry.open ? () => list.fold(entry, true) : undefined,
      Enter: group ? () => list.fold(entry, entry.open) : () => this.find(".am-detail button.primary")?.focus(),
    }[key];
  }
}
