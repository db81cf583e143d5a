// Cells of charts: a chart of many cells shows those that the reader picks.
let picked = new Set(), facts = null;
function adaptedToPage(spec, holder) {
  const cells = holder.hasAttribute("data-compare") ? [$("#compare-a").value, $("#compare-b").value].map(name => name.split(" + ")[0]) : [...picked];
  if (spec.usermeta?.cells) {
    spec.data.values = spec.data.values.filter(value => cells.includes(value.cell));
    if (spec.usermeta.step) spec.height = spec.usermeta.step * Math.max(1, new Set(spec.data.values.map(value => value[spec.encoding.y.field])).size);
    const color = spec.encoding.color;
    if (color?.field === "cell") {
      color.scale.domain = cells; color.scale.range = cells.map((_, index) => facts.colors[index % facts.colors.length]);
      if (cells.length > 14) color.legend = null;
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
$("#shown")?.addEventListener("change", event => document.getElementById("study").classList.toggle("differences", event.target.value === "differences"));

// Latents.
const ROW = 30;
function ranges(open) { // positions where openness is at least half of its maximum
  let most = 0; for (let p = 1; p < open.length; p++) most = Math.max(most, open[p]);
  if (!most) return { text: "nowhere", center: NaN };
  const parts = []; let sum = 0, weight = 0;
  for (let p = 1; p < open.length; p++) {
    sum += p * open[p]; weight += open[p];
    if (open[p] * 2 >= most) { const last = parts.at(-1); if (last && last[1] === p - 1) last[1] = p; else parts.push([p, p]); }
  }
  const center = sum / weight;
  if (parts.length === 1 && parts[0][0] === 1 && parts[0][1] === open.length - 1) return { text: "everywhere", center };
  const text = parts.slice(0, 3).map(([from, to]) => from === to ? from : from + "–" + to).join(", ");
  return { text: parts.length > 3 ? text + " … (" + parts.length + " parts)" : text, center };
}
const COLUMNS = [
  ["latent", "latent", (b, i) => b.latent[i], value => String(value)],
  ["firing rate", "rate", (b, i) => b.firings[i] / b.tokens, value => value >= 0.001 ? (100 * value).toFixed(2) + " %" : value ? (1e6 * value).toFixed(0) + " ppm" : "0"],
  ["position information", "information", (b, i) => b.position_information[i], value => digits(value)],
  ["retention − chance", "retention", (b, i) => b.retention[i] - b.retention_chance[i], value => digits(value)],
  ["open at", "where", (b, i) => ranges(row(b.openness, i)).center, (value, b, i) => ranges(row(b.openness, i)).text],
  ["probe weight", "weight", null, value => value ? (value > 0 ? "+" : "−") + Math.abs(value).toPrecision(2) : "–"],
  ["duplicates", "twins", (b, i) => b.twins ? b.twins[i] : NaN, value => Number.isFinite(value) ? String(value) : "–"],
  ["nearest in other SAEs", "elsewhere", (b, i) => b.near_cosine?.width ? row(b.near_cosine, i)[0] : NaN, value => digits(value, 2)],
  ["other seeds", "seeds", (b, i) => b.seed_cosine?.width ? row(b.seed_cosine, i).reduce((sum, cosine) => sum + cosine, 0) / b.seed_cosine.width : NaN, value => digits(value, 2)],
  ["promotes", "words", null, (value, b, i) => [...row(b.promoted, i).slice(0, 4)].map(word => b.words[word].trim()).join("  ")],
];
const FROM = { context: "the start of the context", text: "the start of the text", sentence: "the start of the sentence", line: "the start of the line", end: "the end of the text" };
const SECONDARY = ["twins", "elsewhere", "seeds", "retention"]; // hidden on narrow screens
class Browser {
  constructor(holder, number) {
    this.number = number; this.holder = holder; this.sort = ["information", true]; this.chosen = null;
    const id = "browser-" + number;
    this.cells = make("select", { "aria-label": "Cell" }, ...facts.latents.map((cell, index) => make("option", { value: index }, `${cell.label} (${cell.kept.toLocaleString("en")} of ${cell.of.toLocaleString("en")})`)));
    this.find = make("input", { type: "search", placeholder: "number or word", "aria-label": "Find latents by number, or by a word that they promote or that is in their strongest texts" });
    this.task = make("select", { "aria-label": "Probe" });
    this.saved = make("button", { type: "button" }, "CSV");
    this.count = make("span", { class: "note" });
    this.rows = make("div", { class: "rows", tabindex: 0, role: "region", "aria-label": "Latents" });
    this.detail = make("section", { class: "latent", "aria-live": "polite", "aria-label": "Selected latent" });
    const heads = COLUMNS.map(([title, key]) => make("th", { scope: "col", class: key === "words" ? "text hide-small" : SECONDARY.includes(key) ? "hide-small" : null, "data-key": key },
      key === "words" ? title : make("button", { type: "button", onclick: () => this.sortBy(key) }, title)));
    this.above = make("tr", { "aria-hidden": true }, make("td", { colspan: COLUMNS.length, style: "padding:0;border:0" })); this.below = this.above.cloneNode(true);
    this.body = make("tbody");
    this.rows.append(make("table", { id }, make("thead", {}, make("tr", {}, ...heads)), this.body));
    holder.append(make("div", { class: "bar" }, make("label", {}, "Cell ", this.cells), make("label", {}, "Find ", this.find), make("label", {}, "Probe ", this.task), this.saved, this.count), this.rows, this.detail);
    this.cells.addEventListener("change", () => this.open(Number(this.cells.value)));
    this.find.addEventListener("input", () => this.refilter());
    this.task.addEventListener("change", () => { this.sort = ["weight", true]; this.weigh(); this.refilter(); });
    this.saved.addEventListener("click", () => this.save());
    this.rows.addEventListener("scroll", () => requestAnimationFrame(() => this.paint()), { passive: true });
    this.rows.addEventListener("keydown", event => {
      const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
      if (!step || !this.order?.length) return;
      event.preventDefault();
      const at = Math.max(0, Math.min(this.order.length - 1, this.order.indexOf(this.chosen) + step));
      this.choose(this.order[at], true);
    });
  }
  async open(index, latent = null) {
    this.cells.value = index; this.holder.setAttribute("aria-busy", true);
    try {
      const block = await table(facts.latents[index].block), texts = await table(block.texts);
      if (Number(this.cells.value) !== index) return; // another cell was selected meanwhile
      Object.assign(block, { words: texts.words, token: texts.token, position: texts.position });
      this.block = block; this.texts = null; this.keys = {};
      this.rowOf = new Map([...block.latent].map((latent, at) => [latent, at]));
      this.task.replaceChildren(make("option", { value: "" }, "any"), ...block.probes.map((name, at) => make("option", { value: at }, name)));
      this.weigh(); this.chosen = null; this.refilter();
      const at = latent === null ? this.order[0] : this.rowOf.get(latent);
      if (at === undefined && latent !== null) { this.chosen = null; this.paint(); this.detail.replaceChildren(make("p", {}, `Latent ${latent} of ${block.cell} is not among the ${block.latent.length} latents on this page; \`posmask report DIR --all\` writes all of them.`)); }
      else if (at !== undefined) this.choose(at, true);
    } catch (error) { this.detail.replaceChildren(make("p", {}, "The latents of this cell cannot be read: " + error.message)); }
    finally { this.holder.removeAttribute("aria-busy"); }
  }
  weigh() { // weight in the selected probe, or the largest weight in any probe
    const b = this.block, only = this.task.value; this.weights = new Float32Array(b.latent.length); this.serves = new Map();
    const width = b.probe_latent.width;
    for (let probe = 0; probe < b.probes.length; probe++) for (let at = 0; at < width; at++) {
      const index = this.rowOf.get(b.probe_latent[probe * width + at]); if (index === undefined) continue;
      const weight = b.probe_weight[probe * width + at];
      if (!this.serves.has(index)) this.serves.set(index, []);
      this.serves.get(index).push([probe, at + 1, weight]);
      if ((only === "" || Number(only) === probe) && Math.abs(weight) > Math.abs(this.weights[index])) this.weights[index] = weight;
    }
    this.keys.weight = null;
  }
  key(name) {
    if (name === "weight") return [...this.weights].map(Math.abs);
    return this.keys[name] ??= Array.from(this.block.latent, (_, at) => COLUMNS.find(([, key]) => key === name)[2](this.block, at));
  }
  search() { // searchable words of each latent: those it promotes and the tokens of its strongest texts
    if (this.texts) return this.texts;
    const b = this.block, width = b.text_value.width / b.text_start.width;
    return this.texts = Array.from(b.latent, (_, at) => {
      const words = [...row(b.promoted, at)].map(word => b.words[word]);
      row(b.text_start, at).forEach((start, n) => { if (start >= 0) for (let t = 0; t < b.text_length[at * b.text_length.width + n]; t++) if (row(b.text_value, at)[n * width + t]) words.push(b.words[b.token[start + t]]); });
      return words.join("\n").toLowerCase();
    });
  }
  refilter() {
    const b = this.block, wanted = this.find.value.trim().toLowerCase(); if (!b) return;
    let order = Array.from(b.latent, (_, at) => at);
    if (/^\d+$/.test(wanted)) order = order.filter(at => String(b.latent[at]).startsWith(wanted));
    else if (wanted) { const texts = this.search(); order = order.filter(at => texts[at].includes(wanted)); }
    if (this.task.value !== "") order = order.filter(at => this.weights[at] !== 0);
    const [name, down] = this.sort, key = this.key(name);
    order.sort((a, b) => { const x = key[a], y = key[b]; if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a - b; return (down ? y - x : x - y) || a - b; });
    this.order = order; this.count.textContent = order.length.toLocaleString("en") + " latents"; this.rows.scrollTop = 0; this.paint();
    $$("th", this.rows).forEach(head => head.dataset.key === name ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort"));
  }
  sortBy(name) { this.sort = [name, this.sort[0] === name ? !this.sort[1] : !["latent", "where"].includes(name)]; this.refilter(); }
  paint() { // only visible rows are in the document
    const first = Math.max(0, Math.floor(this.rows.scrollTop / ROW) - 8), last = Math.min(this.order.length, first + Math.ceil(this.rows.clientHeight / ROW) + 16);
    const shown = this.order.slice(first, last).map(at => {
      const line = make("tr", { "aria-selected": at === this.chosen, "aria-rowindex": this.order.indexOf(at, 0) + 2, onclick: () => this.choose(at) });
      for (const [, key, value, text] of COLUMNS) {
        const number = key === "weight" ? this.weights[at] : value ? value(this.block, at) : null;
        line.append(make("td", { class: key === "words" ? "text hide-small" : SECONDARY.includes(key) ? "hide-small" : null }, text(number, this.block, at)));
      }
      return line;
    });
    this.above.firstChild.style.height = first * ROW + "px"; this.below.firstChild.style.height = (this.order.length - last) * ROW + "px";
    this.body.replaceChildren(...(first ? [this.above] : []), ...shown, ...(last < this.order.length ? [this.below] : []));
    this.rows.firstChild.setAttribute("aria-rowcount", this.order.length + 1);
  }
  choose(at, scroll = false) {
    this.chosen = at;
    if (scroll) { const y = this.order.indexOf(at) * ROW; if (y < this.rows.scrollTop || y > this.rows.scrollTop + this.rows.clientHeight - 3 * ROW) this.rows.scrollTop = Math.max(0, y - 3 * ROW); }
    this.paint(); this.show(at);
  }
  show(at) {
    const b = this.block, fact = (name, value) => make("li", {}, name + " ", make("b", {}, value));
    const serves = (this.serves.get(at) ?? []).sort((a, b) => a[1] - b[1]);
    const parts = make("div", { class: "parts" },
      make("div", { class: "full" }, make("h4", {}, "Where it fires and where its mask is open"), ...this.profile(at)),
      make("div", { class: "full" }, make("h4", {}, "Strongest texts"), ...this.strongest(at)),
      make("div", {}, make("h4", {}, "Promotes"), this.wordList(b.promoted, b.promoted_logit, at), make("h4", {}, "Suppresses"), this.wordList(b.suppressed, b.suppressed_logit, at)),
      make("div", {}, make("h4", {}, "Probes that use it"), serves.length ? make("table", {}, make("thead", {}, make("tr", {}, ...["probe", "choice", "weight"].map(name => make("th", { scope: "col" }, name)))),
        make("tbody", {}, ...serves.slice(0, 12).map(([probe, choice, weight]) => make("tr", {}, make("td", {}, b.probes[probe]), make("td", {}, String(choice)), make("td", {}, (weight > 0 ? "+" : "−") + Math.abs(weight).toPrecision(2)))))) : make("p", { class: "note" }, "No probe selected it.")),
      make("div", {}, make("h4", {}, "Nearest neighbors in this SAE"), this.near(at, true)),
      make("div", {}, make("h4", {}, "Nearest neighbors in other SAEs"), this.near(at, false), make("h4", {}, "Nearest neighbors in other seeds of this cell"), this.nearSeeds(at)));
    this.detail.replaceChildren(make("h3", {}, `Latent ${b.latent[at]} of ${b.cell}`),
      make("ul", { class: "facts" }, fact("fires on", COLUMNS[1][3](b.firings[at] / b.tokens) + ` of ${b.tokens.toLocaleString("en")} tokens`), fact("position information", digits(b.position_information[at])), fact("retention", digits(b.retention[at])), fact("chance level", digits(b.retention_chance[at])), fact("open at", ranges(row(b.openness, at)).text), fact("largest activation", b.largest[at].toPrecision(3))), parts);
  }
  profile(at) {
    const b = this.block, activation = row(b.profile, at), open = row(b.openness, at), n = open.length, width = Math.max(300, Math.min(720, this.detail.clientWidth)), height = 130, left = 34, base = 100;
    const ns = "http://www.w3.org/2000/svg", draw = (tag, attributes, text) => { const element = document.createElementNS(ns, tag); for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value); if (text !== undefined) element.textContent = text; return element; };
    const x = p => left + (width - left - 6) * p / n, svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, class: "profile", role: "img", "aria-label": `Mean activation by position, maximum ${b.highest[at].toPrecision(3)}, and openness: ${ranges(open).text}` });
    let bars = "", line = "";
    for (let p = 1; p < n; p++) { if (activation[p]) bars += `M${x(p).toFixed(1)} ${base}v${(-activation[p] / 255 * 84).toFixed(1)}h${((width - left - 6) / n * 0.86).toFixed(2)}V${base}z`; line += `${p === 1 ? "M" : "L"}${x(p).toFixed(1)} ${(base - open[p] / 255 * 88).toFixed(1)}H${x(p + 1).toFixed(1)}`; }
    svg.append(draw("path", { d: bars, fill: "var(--bar)" }), draw("path", { d: line, fill: "none", stroke: "var(--heat)", "stroke-width": 2 }), draw("path", { d: `M${left} ${base}H${width - 6}`, stroke: "var(--line)" }));
    for (let p = 0; p < n; p += Math.max(4, 2 ** Math.ceil(Math.log2(n * 28 / width)))) svg.append(draw("text", { x: x(p), y: base + 13, "text-anchor": "middle" }, p));
    svg.append(draw("text", { x: left - 4, y: 16, "text-anchor": "end" }, "1"), draw("text", { x: left - 4, y: base, "text-anchor": "end" }, "0"));
    return [svg, make("p", { class: "note" }, `Bars are the mean activation per position (maximum ${b.highest[at].toPrecision(3)}); the line is openness. Positions are counted from ${FROM[b.position_origin]}.`)];
  }
  strongest(at) {
    const b = this.block, per = b.text_start.width, width = b.text_value.width / per, lines = [];
    for (let n = 0; n < per; n++) {
      const start = b.text_start[at * per + n], length = b.text_length[at * per + n]; if (start < 0) continue;
      const values = row(b.text_value, at).subarray(n * width, n * width + length), most = Math.max(...values); let marked = false;
      const line = make("div", { class: "tokens" });
      for (let t = 0; t < length; t++) {
        const position = b.position[start + t], word = make("bdi", {}, b.words[b.token[start + t]]);
        const token = make("span", { title: `position ${position}, activation ${(values[t] / 255 * b.largest[at]).toPrecision(3)}` }, word, make("small", {}, position % 5 === 0 || t === 0 ? String(position) : ""));
        if (values[t]) word.style.setProperty("--a", Math.round(12 + 78 * values[t] / 255) + "%");
        if (values[t] === most && !marked) { marked = true; token.classList.add("peak"); }
        line.append(token);
      }
      lines.push(line);
    }
    return lines.length ? [...lines, make("p", { class: "note" }, `From the first ${b.searched.toLocaleString("en")} held-out tokens, at most one passage per text. Color is the activation, the strongest token is outlined, and positions are below the tokens.`)] : [make("p", { class: "note" }, "It fired on none of the searched tokens.")];
  }
  wordList(ids, logits, at) {
    return make("ul", { class: "words" }, ...[...row(ids, at)].map((word, index) => make("li", {}, make("bdi", {}, this.block.words[word]), make("small", {}, (logits[at * logits.width + index] > 0 ? "+" : "") + logits[at * logits.width + index].toFixed(1).replace("-", "−")))));
  }
  near(at, sameCell) {
    const b = this.block, ids = sameCell ? b.near_own : b.near_latent;
    if (!ids?.width) return make("p", { class: "note" }, "There are none.");
    const cosines = row(sameCell ? b.near_own_cosine : b.near_cosine, at);
    const lines = [...row(ids, at)].map((latent, index) => {
      const cell = sameCell ? Number(this.cells.value) : b.near_cell[at * b.near_cell.width + index], kept = sameCell ? this.rowOf.get(latent) : null;
      const where = sameCell && kept !== undefined ? `open at ${ranges(row(b.openness, kept)).text}`.replace("at everywhere", "everywhere") : sameCell ? "not on this page" : facts.latents[cell].cell;
      return make("tr", {}, make("td", {}, make("button", { type: "button", onclick: () => browse(1 - this.number, cell, latent) }, "latent " + latent)), make("td", {}, where), make("td", {}, digits(cosines[index], 2)));
    });
    const about = sameCell ? `${b.twins[at]} other latents of this SAE have a decoder cosine above 0.7.` : "The latent with the largest decoder cosine in each other SAE of this seed.";
    return make("div", { class: "near" }, make("p", { class: "note" }, about), make("table", {}, make("tbody", {}, ...lines)));
  }
  nearSeeds(at) {
    const b = this.block;
    if (!b.other_seeds.length) return make("p", { class: "note" }, "The page has no other seed of this cell.");
    const lines = b.other_seeds.map((seed, number) => {
      const latent = row(b.seed_latent, at)[number], cell = facts.latents.findIndex(entry => entry.cell === b.cell && entry.seed === seed), name = "latent " + latent;
      return make("tr", {}, make("td", {}, cell < 0 ? name : make("button", { type: "button", onclick: () => browse(1 - this.number, cell, latent) }, name)), make("td", {}, "seed " + seed), make("td", {}, digits(row(b.seed_cosine, at)[number], 2)));
    });
    return make("div", { class: "near" }, make("p", { class: "note" }, "The latent with the largest decoder cosine in each other seed. A cosine near 1 means that the other seed has the same feature."), make("table", {}, make("tbody", {}, ...lines)));
  }
  save() {
    const b = this.block, lines = this.order.map(at => COLUMNS.map(([, key, value, text]) => key === "weight" ? this.weights[at] : key === "where" || key === "words" ? text(null, b, at) : value(b, at)));
    save(`${pageName}-latents-${b.cell}.csv`.replace(/[^\w.-]+/g, "-"), "text/csv", csv([COLUMNS.map(([title]) => title), ...lines]));
  }
}
let browsers = [];
async function browse(number, cell, latent = null) {
  if (number >= browsers.length) setTwo(true);
  await browsers[number].open(cell, latent);
  if (browsers[number].chosen !== null || latent !== null) browsers[number].holder.scrollIntoView({ block: "nearest" });
}
function setTwo(two) {
  $("#two").checked = two; $("#browsers").classList.toggle("two", two);
  if (two && browsers.length < 2) { const holder = make("div"); $("#browsers").append(holder); browsers.push(new Browser(holder, 1)); }
  if (browsers[1]) browsers[1].holder.hidden = !two;
}

// Comparison of two cells.
function compare() {
  const [a, b] = ["#compare-a", "#compare-b"].map(id => $(id).value), body = $("#compared").tBodies[0];
  const verdicts = new Map(), opposite = { better: "worse", worse: "better" };
  for (const [label, against, column, effect, low, high, verdict] of facts.verdicts) {
    const sign = label === a && against === b ? 1 : label === b && against === a ? -1 : 0, plus = value => (value > 0 ? "+" : "") + digits(value);
    const word = verdict in opposite && sign < 0 ? opposite[verdict] : verdict;
    if (sign) verdicts.set(facts.compared[column], `${plus(sign * effect)} (${plus(sign > 0 ? low : -high)} to ${plus(sign > 0 ? high : -low)}), ${word}`);
  }
  body.replaceChildren(...facts.columns.map((name, index) => {
    const first = facts.numbers[a][index], second = facts.numbers[b][index], shown = number => number ? make("td", { "data-value": number[0] }, number[1], make("span", { class: "i" }, number[2])) : make("td", { "data-value": "" }, "–");
    const difference = first && second ? first[0] - second[0] : NaN;
    return make("tr", {}, make("th", { scope: "row" }, name), shown(first), shown(second), make("td", {}, Number.isFinite(difference) ? (difference > 0 ? "+" : "") + (facts.digits[index] ? digits(difference) : difference.toLocaleString("en")) : "–"), make("td", {}, verdicts.get(index) ?? "–"));
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
    $("#compare-latents")?.addEventListener("click", async () => {
      const index = id => facts.latents.findIndex(cell => cell.cell === $(id).value.split(" + ")[0]), indices = [index("#compare-a"), index("#compare-b")];
      if (indices.some(index => index < 0)) { announce("One of the two cells has no latents on this page"); return; }
      setTwo(true); await Promise.all([browse(0, indices[0]), browse(1, indices[1])]); $("#latents").scrollIntoView();
    });
  }
  $$(".chart").forEach(holder => watcher.observe(holder));
  if (facts.latents.length) {
    const holder = make("div"); $("#browsers").append(holder); browsers.push(new Browser(holder, 0));
    $("#two").addEventListener("change", async event => { setTwo(event.target.checked); if (event.target.checked && !browsers[1].block) await browsers[1].open(Math.min(1, facts.latents.length - 1)); });
    // The list is filled when it is near the viewport.
    new IntersectionObserver((entries, observer) => { if (entries.some(entry => entry.isIntersecting)) { observer.disconnect(); if (!browsers[0].block) browsers[0].open(0); } }, { rootMargin: "400px" }).observe(holder);
  }
  document.documentElement.dataset.ready = "";
});
