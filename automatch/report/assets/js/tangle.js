// The two module trees side by side (a tanglegram). Consecutive numbered siblings of equal structure stand as one
// branch {0…11}; the trees unfold breadth first to as many lines as fit, and on demand beyond that.
const LINES = 26;
const LINE = 26;

// The modules of one side: {name, kids, keys, size, form}; form names the structure below, whatever its path.
function moduleTree(review, side) {
  const node = (name) => ({ name, kids: new Map(), keys: [], size: 0, form: 0 });
  const root = node("");
  review.sides[side].keys.forEach((key, place) => {
    let at = root;
    const words = key.length > 2000 ? [key] : key.split(".");
    at.size++;
    for (let i = 0; i < words.length - 1; i++) {
      if (!at.kids.has(words[i])) at.kids.set(words[i], node(words[i]));
      at = at.kids.get(words[i]);
      at.size++;
    }
    at.keys.push(place);
  });
  const forms = new Map();
  const nameForm = (at) => {
    const kids = [...at.kids].map(([name, kid]) => `${name}:${nameForm(kid)}`);
    const own = at.keys.map((place) => `${review.sides[side].keys[place].split(".").pop()}${review.shape(side, place)}`);
    const text = JSON.stringify([kids, own]);
    if (!forms.has(text)) forms.set(text, forms.size);
    return (at.form = forms.get(text));
  };
  nameForm(root);
  return root;
}

// A branch of the picture: one module, or several of equal form that are shown as one.
function branch(label, path, nodes) {
  return { label, path, nodes, size: nodes.reduce((sum, node) => sum + node.size, 0), open: false, kids: null };
}

function kidsOf(parent) {
  if (parent.kids) return parent.kids;
  const first = parent.nodes[0];
  const names = [...first.kids.keys()];
  const numbered = (name) => /^\d+$/.test(name);
  if (names.every(numbered)) names.sort((a, b) => a - b);
  const kids = [];
  for (let i = 0; i < names.length;) {
    let end = i + 1;
    const form = first.kids.get(names[i]).form;
    while (end < names.length && numbered(names[i]) && numbered(names[end]) && first.kids.get(names[end]).form === form) end++;
    const group = names.slice(i, end);
    const label = group.length > 1 ? ranges(group.map(Number)) : short(names[i], 60);
    const nodes = parent.nodes.flatMap((node) => group.map((name) => node.kids.get(name)));
    kids.push(joined(branch(label, parent.path ? `${parent.path}.${group.length > 1 ? "" : names[i]}` : names[i], nodes)));
    i = end;
  }
  return (parent.kids = kids);
}

// A branch whose only content is one branch stands on one line with it.
function joined(kid) {
  let at = kid;
  while (at.nodes[0].keys.length === 0 && kidsOf(at).length === 1) {
    const only = at.kids[0];
    at = { ...only, label: `${at.label}.${only.label}` };
  }
  return at;
}

function unfold(root, lines) {
  root.open = true;
  let shown = kidsOf(root).length;
  let level = [...root.kids];
  while (level.length) {
    const next = [];
    for (const at of level) {
      const kids = kidsOf(at);
      if (!kids.length || shown + kids.length > lines) continue;
      at.open = true;
      shown += kids.length;
      next.push(...kids);
    }
    level = next;
  }
}

class Tangle {
  constructor(root, review, onFilter) {
    this.review = review;
    this.onFilter = onFilter;
    this.box = root.querySelector(".am-tangle");
    this.note = root.querySelector(".am-tangle-note");
    this.rest = this.note.textContent;
    this.lists = [...this.box.querySelectorAll("ul")];
    this.links = this.box.querySelector("svg");
    this.roots = [0, 1].map((side) => branch("", "", [moduleTree(review, side)]));
    this.roots.forEach((at) => unfold(at, LINES));
    this.draw();
    new ResizeObserver(() => this.drawLinks()).observe(this.box);
  }

  draw() {
    this.lines = this.roots.map((root, side) => this.linesOf(root, side));
    this.count();
    this.lists.forEach((list, side) => list.replaceChildren(...this.lines[side].map((line, at) => this.item(side, line, at))));
    this.drawLinks();
  }

  // The visible lines of one side, each with the keys that no deeper line shows.
  linesOf(root, side) {
    const lines = [];
    this.lineOf = this.lineOf || [];
    const owner = (this.lineOf[side] = new Int32Array(this.review.sides[side].keys.length).fill(-1));
    const claim = (node, line, deep) => {
      for (const place of node.keys) owner[place] = line;
      if (deep) for (const kid of node.kids.values()) claim(kid, line, true);
    };
    const walk = (at, depth) => {
      const line = lines.push({ at, depth, unmatched: 0, keys: 0 }) - 1;
      for (const node of at.nodes) claim(node, line, !at.open);
      if (at.open) for (const kid of kidsOf(at)) walk(kid, depth + 1);
    };
    if (root.nodes[0].keys.length) {
      lines.push({ at: { ...branch("(top level)", "", root.nodes), fixed: true }, depth: 0, unmatched: 0, keys: 0 });
      claim(root.nodes[0], 0, false);
    }
    for (const kid of kidsOf(root)) walk(kid, 0);
    return lines;
  }

  // How many keys each pair of lines shares, and how sure the least sure of them is.
  count() {
    const { review } = this;
    const [from, to] = this.lineOf;
    const pairs = new Map();
    for (let t = 0; t < to.length; t++) {
      const line = this.lines[1][to[t]];
      const now = review.current(t);
      line.keys++;
      if (!now && !review.harmless[1].has(t)) line.unmatched++;
      for (const source of now ? now.sources : []) {
        const id = from[source] * 100000 + to[t];
        const pair = pairs.get(id) || { from: from[source], to: to[t], n: 0, least: 1, open: 0 };
        pair.n++;
        pair.least = Math.min(pair.least, now.confidence);
        pair.open += review.isOpen(t) ? 1 : 0;
        pairs.set(id, pair);
      }
    }
    for (let s = 0; s < from.length; s++) {
      const line = this.lines[0][from[s]];
      line.keys++;
      if (!review.used[s] && !review.harmless[0].has(s)) line.unmatched++;
    }
    this.pairs = [...pairs.values()].sort((a, b) => a.open - b.open);
  }

  item(side, line, at) {
    const { at: node, depth, unmatched, keys } = line;
    const foldable = !node.fixed && kidsOf(node).length > 0;
    const state = unmatched === 0 ? "" : unmatched >= keys ? "lost" : "partly";
    const words = `${node.label}, ${counted(node.size, "key")}${unmatched ? `, ${unmatched} left over` : ""}`;
    const button = h(
      "button",
      {
        type: "button",
        "aria-expanded": foldable ? String(node.open) : null,
        "aria-label": `${side ? "model" : "checkpoint"} ${words}`,
        title: words,
        onclick: () => (foldable ? this.toggle(side, node, at) : this.onFilter(node.path)),
        onmouseenter: () => this.light(side, at),
        onfocus: () => this.light(side, at),
        onmouseleave: () => this.light(),
        onblur: () => this.light(),
      },
      h("span.fold", { "aria-hidden": "true" }, foldable ? (node.open ? "▾" : "▸") : ""),
      h("span.label", null, node.label),
      unmatched ? h("span.left", null, `${thousands(unmatched)} left over`) : h("span.n", null, thousands(node.size)),
    );
    button.style.setProperty("--depth", Math.min(depth, 6));
    return h(`li${state ? "." + state : ""}`, null, button);
  }

  toggle(side, node, at) {
    node.open = !node.open;
    this.draw();
    this.lists[side].children[at].firstChild.focus();
  }

  drawLinks() {
    const width = this.links.clientWidth || 200;
    const height = Math.max(...this.lines.map((lines) => lines.length)) * LINE;
    this.links.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.links.style.height = `${height}px`;
    this.paths = this.pairs.map((pair) => this.strands(pair, width));
    this.links.replaceChildren(...this.paths.flat());
  }

  // One line per pair of modules, dashed where most of its keys are open; a thin dashed one on top where a few are.
  strands({ from, to, n, open, least }, width) {
    const [y1, y2] = [from, to].map((line) => line * LINE + LINE / 2);
    const strand = (band, thickness) => {
      const path = svg("path", { class: band, d: `M0 ${y1}C${width / 2} ${y1} ${width / 2} ${y2} ${width} ${y2}` });
      path.style.strokeWidth = thickness;
      return path;
    };
    const thickness = Math.min(1.25 + Math.log2(n) * 0.5, 7);
    const band = least >= 0.5 ? "uncertain" : "weak";
    if (open === 0) return [strand("sure", thickness)];
    return open * 2 > n ? [strand(band, thickness)] : [strand("sure mixed", thickness), strand(band, 1.75)];
  }

  light(side, at) {
    const on = at !== undefined;
    this.box.classList.toggle("lit", on);
    const mine = this.pairs.filter((pair, i) => {
      const hit = on && (side ? pair.to : pair.from) === at;
      for (const path of this.paths[i]) path.classList.toggle("on", hit);
      return hit;
    });
    const others = new Set(mine.map((pair) => (side ? pair.from : pair.to)));
    if (on) [...this.lists[1 - side].children].forEach((li, i) => li.classList.toggle("on", others.has(i)));
    else for (const li of this.box.querySelectorAll("li.on")) li.classList.remove("on");
    this.note.textContent = on ? this.describe(side, at, mine) : this.rest;
  }

  describe(side, at, mine) {
    const name = (s, i) => this.lines[s][i].at.label;
    if (!mine.length) return `${name(side, at)}: ${side ? "nothing feeds it" : "feeds nothing"}`;
    const parts = mine
      .slice(0, 4)
      .map((pair) => `${name(1 - side, side ? pair.from : pair.to)} (${counted(pair.n, "key")}, least sure ${percent(pair.least)})`);
    return `${name(side, at)} ${side ? "←" : "→"} ${parts.join(", ")}${mine.length > 4 ? ` and ${mine.length - 4} more` : ""}`;
  }
}
