// The JSON form of the mapping, version 1, with every answer and decision in it.
function exportMapping(review) {
  const { data, source, target } = review;
  const m = data.matches;
  const keysOf = (places) => places.map((place) => source.keys[place]);
  const step = (place) => review.transforms[place][0];
  const matches = [];
  const missing = [];
  for (let t = 0; t < target.keys.length; t++) {
    const now = review.current(t);
    if (now === null) {
      missing.push(target.keys[t]);
      continue;
    }
    const kept = review.evidence(t, now);
    const [name, shape, size, order, context] = kept || [null, null, null, null, null];
    const alternatives = kept ? review.alternatives(t) : [];
    const match = {
      target: target.keys[t],
      sources: keysOf(now.sources),
      transform: step(now.transform),
      score: kept ? m.score[now.at] : 0,
      confidence: now.confidence,
      evidence: { name, shape, size, order, context },
      alternatives: alternatives.map((a) => ({ sources: keysOf(a.sources), transform: step(a.transform), confidence: a.confidence })),
    };
    matches.push(now.decided ? { ...match, decided: true } : match);
  }
  const mapping = {
    format: "automatch-mapping",
    version: 1,
    source: exportSide(review, 0),
    target: exportSide(review, 1),
    matches,
    missing_keys: missing,
    unexpected_keys: source.keys.filter((_, place) => !review.used[place]),
    questions: data.questions.filter((_, place) => !review.answers.has(place)).map((question) => exportQuestion(review, question)),
    warnings: data.warnings,
  };
  return data.verdict ? { ...mapping, verdict: data.verdict } : mapping;
}

function exportSide(review, side) {
  const { origin, fingerprint, n, wrapper, keys, shape, alias } = review.sides[side];
  const known = { origin, fingerprint, keys: n };
  if (wrapper === null) return known;
  const entries = shape.map((_, i) => {
    const first = alias[i] === undefined ? null : keys[alias[i]];
    return [keys[i], review.shape(side, i), ...["dtype", "kind", "owner"].map((field) => review.word(side, field, i)), first ?? null];
  });
  return { ...known, wrapper, entries };
}

function exportQuestion(review, { id, text, keys, options }) {
  return {
    id,
    text,
    keys: keys.map((place) => review.target.keys[place]),
    options: options.map((option) => ({
      label: option.label,
      confidence: option.confidence ?? 0,
      matches: option.matches.map(([target, sources, transform]) => ({
        target: review.target.keys[target],
        sources: listed(sources).map((place) => review.source.keys[place]),
        transform: review.transforms[transform][0],
      })),
    })),
  };
}

async function downloadMapping(review) {
  const blob = new Blob([JSON.stringify(exportMapping(review))], { type: "application/json" });
  const link = h("a", { href: URL.createObjectURL(blob), download: "mapping.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  return "Written. Next: automatch apply CKPT --mapping mapping.json -o NEW";
}
