// Coverage and confidence: written by the template, redrawn after every decision in the same words.
const COVERAGE = { sure: "confident", withheld: "withheld", missing: "missing", harmless: "missing but harmless" };
const FLOORS = [0.99, 0.95, 0.8, 0.5, 0];

class Glance {
  constructor(root, review) {
    this.review = review;
    [this.fed, this.bar, this.legend, this.rest] = [".fed", ".bar", ".legend", ".rest"].map((name) => root.querySelector(`.am-glance ${name}`));
    this.bins = [...root.querySelectorAll(".am-histogram li")];
  }

  draw() {
    const { review } = this;
    const counts = { sure: 0, withheld: 0, missing: 0, harmless: 0 };
    const bins = FLOORS.map(() => 0);
    for (let target = 0; target < review.target.keys.length; target++) {
      const now = review.current(target);
      counts[now ? (review.isOpen(target) ? "withheld" : "sure") : review.harmless[1].has(target) ? "harmless" : "missing"]++;
      if (now) bins[FLOORS.findIndex((floor) => now.confidence >= floor)]++;
    }
    this.drawCoverage(counts);
    this.drawBins(bins);
    this.rest.textContent = this.unexpected();
  }

  unexpected() {
    const { harmless, used } = this.review;
    const number = used.reduce((sum, is) => sum + !is, 0);
    const safe = harmless[0].size;
    const tail = !safe ? "" : safe === number ? ", all harmless" : `, ${thousands(safe)} of them harmless`;
    return number ? `The checkpoint has ${counted(number, "key")} more${tail}.` : "";
  }

  drawCoverage(counts) {
    const total = this.review.target.n;
    const fed = `${thousands(counts.sure + counts.withheld)} of ${counted(total, "model key")} fed`;
    const bands = Object.entries(COVERAGE);
    const rects = [];
    let at = 0;
    for (const [band] of bands) {
      const width = (counts[band] / Math.max(total, 1)) * 1000;
      if (width) rects.push(svg("rect", { class: `f-${band}`, x: at, y: 0, width, height: 10 }));
      at += width;
    }
    this.fed.textContent = fed;
    this.bar.setAttribute("aria-label", `${fed}: ${bands.map(([band, words]) => `${counts[band]} ${words}`).join(", ")}`);
    this.bar.firstElementChild.replaceChildren(...rects);
    const shown = bands.filter(([band]) => counts[band] || band === "sure");
    const dot = (band) => h(`i.dot.b-${band}`, { "aria-hidden": "true" });
    this.legend.replaceChildren(...shown.map(([band, words]) => h("li", null, dot(band), h("b", null, thousands(counts[band])), " ", words)));
  }

  drawBins(bins) {
    const most = Math.max(...bins, 1);
    this.bins.forEach((item, i) => {
      item.querySelector("rect").setAttribute("width", bins[i] ? Math.max((bins[i] / most) * 100, 1) : 0);
      item.querySelector("b").textContent = thousands(bins[i]);
    });
  }
}
