// Cells of charts: a chart of many cells shows those that the reader picks.
let picked = new Set(), facts = null;
function adaptedToPage(spec, holder) {
  const cells = holder.hasAttribute("data-compare") ? [$("#compare-a").value, $("#compare-b").value].map(name => name.split(" + ")[0]) : [...picked];
  if (spec.usermeta?.cells) {
    spec.data.values = spec.data.values.filter(value => value.cell === undefined || cells.includes(value.cell));
    // Vega warns about a panel without values, as that of differences to the baseline if only the baseline is picked.
    if (spec.vconcat) { const full = new Set(spec.data.values.map(value => value.panel)); spec.vconcat = spec.vconcat.filter(part => full.has(part.description)); }
    if (spec.usermeta.step) spec.height = spec.usermeta.step * Math.max(1, new Set(spec.data.values.map(value => value[spec.encoding.y.field])).size);
    for (const { encoding } of (spec.vconcat ?? [spec]).flatMap(part => part.layer ?? [part])) {
      const color = encoding?.color;
      if (color?.field !== "cell") continue;
      color.scale.domain = cells; color.scale.range = cells.map(cell => facts.colors[cell]);
      if (spec.vconcat) color.legend = { ...color.legend, orient: "top", columns: Math.max(2, Math.floor(holder.clientWidth / 150)) };
      else if (cells.length > 14) color.legend = null;
      else if (holder.clientWidth < 560) color.legend = { ...color.legend, orient: "bottom", columns: 2 };
    }
  }
  if (holder.clientWidth < 560) for (const layer of spec.layer ?? []) if (layer.encoding?.text) layer.encoding.text.field += " narrow";
  return spec;
}
function pick(cells) {
  picked = new Set(cells);
  $$("#picks button").forEach(button => button.setAttribute("aria-pressed", picked.has(button.dataset.cell)));
  drawn.forEach(async holder => { if ((await json("chart-" + holder.dataset.chart)).usermeta?.cells) draw(holder); });
}
// Differences or values; columns and rows without any difference are hidden beside differences.
$("#shown")?.addEventListener("change", event => {
  const results = $("#study"), isDifferences = event.target.value === "differences", lines = [...results.tBodies[0].rows];
  const isEmpty = cells => isDifferences && cells.every(cell => !$(".d", cell)?.textContent);
  results.classList.toggle("differences", isDifferences);
  $$("thead th", results).forEach((head, index) => {
    const cells = lines.map(line => line.children[index]), isHidden = index > 0 && isEmpty(cells);
    for (const cell of [head, ...cells]) cell.hidden = isHidden;
  });
  for (const line of lines) line.classList.toggle("empty", isEmpty([...line.children].slice(1)));
});

// Comparison of two cells.
function compare() {
  const [a, b] = ["#compare-a", "#compare-b"].map(id => $(id).value), body = $("#compared").tBodies[0];
  const verdicts = new Map(), opposite = { better: "worse", worse: "better" };
  for (const [label, against, column, effect, low, high, verdict] of facts.verdicts) {
    const sign = label === a && against === b ? 1 : label === b && against === a ? -1 : 0, plus = value => (Number(value.toFixed(3)) > 0 ? "+" : "") + digits(value);
    const isUnclear = verdict === "undecided" && low * high > 0; // the interval excludes zero
    const word = isUnclear ? "not significant after correction" : verdict in opposite && sign < 0 ? opposite[verdict] : verdict;
    if (sign) verdicts.set(facts.compared[column], `${plus(sign * effect)} (${plus(sign > 0 ? low : -high)} to ${plus(sign > 0 ? high : -low)}), ${word}`);
  }
  body.replaceChildren(...facts.columns.map((name, index) => {
    const first = facts.numbers[a][index], second = facts.numbers[b][index], shown = number => number ? make("td", { "data-value": number[0] }, number[1], make("span", { class: "i" }, number[2])) : make("td", { "data-value": "" }, "–");
    const difference = first && second ? first[0] - second[0] : NaN;
    return make("tr", {}, make("th", { scope: "row" }, name), shown(first), shown(second), make("td", {}, Number.isFinite(difference) ? (Number(difference.toFixed(3)) > 0 ? "+" : "") + (facts.digits[index] ? digits(difference) : difference.toLocaleString("en")) : "–"), make("td", {}, verdicts.get(index) ?? "–"));
  }));
  $$("[data-compare]").forEach(holder => drawn.has(holder) && draw(holder));
}

ready = json("page").then(loaded => { facts = loaded; pick(facts.picked); });
ready.then(async () => {
  $$("#picks button").forEach(button => button.addEventListener("click", () => { const cells = new Set(picked); cells.has(button.dataset.cell) ? cells.delete(button.dataset.cell) : cells.add(button.dataset.cell); pick(facts.cells.filter(cell => cells.has(cell))); }));
  $$("[data-pick]").forEach(button => button.addEventListener("click", () => pick({ all: facts.cells, none: [], first: facts.picked }[button.dataset.pick])));
  if ($("#compare-a")) {
    for (const id of ["#compare-a", "#compare-b"]) { $(id).append(...Object.keys(facts.numbers).map(label => make("option", {}, label))); $(id).addEventListener("change", compare); }
    const labels = Object.keys(facts.numbers); $("#compare-b").value = labels.find(label => facts.baselines.includes(label)) ?? labels[0];
    $("#compare-a").value = labels.find(label => label !== $("#compare-b").value) ?? labels[0];
    compare();
  }
  $$(".chart").forEach(holder => watcher.observe(holder));
  if (facts.latents.length) startLatents(facts.latents, facts.colors);
  drawAll().then(fillLatents);
  document.documentElement.dataset.ready = "";
});
