// Latents as an app: a list and a map beside the selected latent. Its address is #cell=NAME&seed=N&latent=N&p=FROM-TO.
const ROW = 30, LIFTED = "with the mask lifted";
const SVG = (tag, attributes, ...inside) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...inside);
  return element;
};
const percent = value => !Number.isFinite(value) ? "–" : value >= 0.0995 ? (100 * value).toFixed(1) + " %" : value >= 0.001 ? (100 * value).toFixed(2) + " %" : value ? (1e6 * value).toFixed(0) + " ppm" : "0 %";
const signed = (value, text) => (value > 0 ? "+" : value < 0 ? "−" : "") + text(Math.abs(value));
const span = (from, to) => from === to ? String(from) : from + "–" + to;
const spaced = word => word.replace(/^ +| +$/g, spaces => "␣".repeat(spaces.length));
const activation = value => value >= 1000 ? value.toFixed(0) : value.toPrecision(3);
const FROM = { context: "the start of the context", text: "the start of the text", sentence: "the start of the sentence", line: "the start of the line", end: "the end of the text" };
const CLASS_COLORS = { "position-tracking": "var(--c-tracking)", mixed: "var(--c-mixed)", content: "var(--c-content)", dense: "var(--c-dense)", dead: "var(--c-dead)", undecided: "var(--c-undecided)" };

function openRanges(open) { // positions where openness is at least half of its maximum
  let most = 0; for (let p = 1; p < open.length; p++) most = Math.max(most, open[p]);
  if (!most) return { text: "nowhere", center: NaN };
  const parts = []; let sum = 0, weight = 0;
  for (let p = 1; p < open.length; p++) {
    sum += p * open[p]; weight += open[p];
    if (open[p] * 2 >= most) { const last = parts.at(-1); if (last && last[1] === p - 1) last[1] = p; else parts.push([p, p]); }
  }
  const center = sum / weight;
  if (parts.length === 1 && parts[0][0] === 1 && parts[0][1] === open.length - 1) return { text: "everywhere", center };
  const text = parts.slice(0, 3).map(([from, to]) => span(from, to)).join(", ");
  return { text: parts.length > 3 ? `${text} … (${parts.length} parts)` : text, center };
}
// Each metric of a latent: title, value, text of the value.
const mean = values => values.reduce((sum, value) => sum + value, 0) / values.length;
const METRICS = {
  latent: ["latent", (b, i) => b.latent[i], String],
  rate: ["firing rate", (b, i) => b.firings[i] / b.tokens, percent],
  information: ["position information", (b, i) => b.position_information[i], value => digits(value)],
  content: ["content share", (b, i) => b.shift_content ? b.shift_content[i] : NaN, value => digits(value, 2)],
  share: ["share at the positions", (b, i, app) => app.shareAt(i), value => Number.isFinite(value) ? (100 * value).toFixed(1) + " %" : "–"],
  weight: ["probe weight", (b, i, app) => app.weights[i], value => value ? signed(value, size => size.toPrecision(2)) : "–"],
  where: ["mask open at", (b, i) => openRanges(row(b.openness, i)).center, (value, b, i) => openRanges(row(b.openness, i)).text.replace("everywhere", "all")],
  peak: ["peak position", (b, i) => b.peak_position ? b.peak_position[i] : NaN, value => value >= 0 ? String(value) : "–"],
  retention: ["retention − chance", (b, i) => b.retention[i] - b.retention_chance[i], value => digits(value)],
  shift: ["position share, shift design", (b, i) => b.shift_position ? b.shift_position[i] : NaN, value => digits(value)],
  q: ["q-value", (b, i) => b.q_value ? b.q_value[i] : NaN, value => Number.isFinite(value) ? value.toPrecision(2) : "–"],
  copies: ["copies in this SAE", (b, i) => b.copies ? b.copies[i] : NaN, value => Number.isFinite(value) ? String(value) : "–"],
  elsewhere: ["cosine in other SAEs", (b, i) => b.near_cosine?.width ? row(b.near_cosine, i)[0] : NaN, value => digits(value, 2)],
  seeds: ["cosine in other seeds", (b, i) => b.seed_cosine?.width ? mean([...row(b.seed_cosine, i)]) : NaN, value => digits(value, 2)],
};
const MEANINGS = {
  "fires on": "Share of the held-out tokens at which its activation is above zero.",
  "position information": "Share of the uncertainty about whether it fires that position explains, beyond what content alone would give: 0 is none, 1 is all.",
  "shift design:": "The same texts stand at several positions. Shares of the variance of its activation that the text explains at any position (content), the position whatever the text, and both together (interaction).",
  retention: "Fraction of its activation, without the mask, that stays at the positions where the mask was open; chance is the fraction expected of a latent that ignores position.",
  "mask open": "Positions at which the mask is at least half as open as at its most open position.",
  probes: "Probes that selected it: the rank of the choice, and its weight.",
};
const ASCENDING = ["latent", "where", "peak", "q"];
const SHORT = { rate: "fires", information: "position", content: "content", share: "share there", weight: "weight", where: "open at", peak: "peak", retention: "retained", shift: "shift pos.", copies: "copies", elsewhere: "elsewhere", seeds: "seeds" };
const EXTRA = ["weight", "share", "where", "peak", "retention", "shift", "q", "copies", "elsewhere", "seeds"];

// A place on the horizontal axis for each position: bins of positions are equally wide.
function axisOf(b, left, right) {
  const n = b.bin_start.length, width = (right - left) / n;
  const at = p => { // p may be fractional; the end of a bin is the start of the next
    let bin = 0; while (bin < n - 1 && p >= b.bin_start[bin + 1]) bin++;
    return left + width * (bin + Math.min(1, Math.max(0, (p - b.bin_start[bin]) / (b.bin_end[bin] + 1 - b.bin_start[bin]))));
  };
  const binAt = x => Math.max(0, Math.min(n - 1, Math.floor((x - left) / width)));
  const ticks = []; let free = -Infinity;
  for (let bin = 0; bin < n; bin++) if (left + width * (bin + 0.5) >= free) { ticks.push([left + width * (bin + 0.5), b.bin_start[bin]]); free = left + width * (bin + 0.5) + 9 + 7 * String(b.bin_end[n - 1]).length; }
  return { n, width, at, binAt, ticks, left: bin => left + width * bin, middle: bin => left + width * (bin + 0.5) };
}
function niceTicks(most) { // two to five round numbers from 0
  const power = 10 ** Math.floor(Math.log10(most / 2)), step = [1, 2, 5, 10].map(by => by * power).find(step => most / step < 4);
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, n) => n * step);
}
const rateOf = (b, name, at, bin) => b[name][at * b[name].width + bin] / 65535 * b.rate_top[at];
function spark(b, at, width = 64, height = 22) { // the profile in a row or a card
  const axis = axisOf(b, 0, width), svg = SVG("svg", { class: "spark", viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": true });
  for (const name of ["rate", "lifted_rate"]) {
    if (!b[name]) continue;
    let line = ""; for (let bin = 0; bin < axis.n; bin++) line += `${bin ? "L" : "M"}${axis.middle(bin).toFixed(1)} ${(height - 2 - (height - 4) * Math.min(1, row(b[name], at)[bin] / Math.max(1, topOf(b, at)))).toFixed(1)}`;
    svg.append(SVG("path", { class: name === "rate" ? "line" : "line lifted", d: line }));
  }
  return svg;
}
const topOf = (b, at) => Math.max(...row(b.rate, at), ...(b.lifted_rate ? row(b.lifted_rate, at) : []));

class Latents {
  constructor(holder, cells, colors) {
    Object.assign(this, { holder, cells, colors, extra: "seeds", sort: ["information", true], chosen: null, range: null });
    this.choice = make("select", { "aria-label": "Cell" }, ...cells.map((cell, index) => make("option", { value: index }, `${cell.label} (${cell.kept.toLocaleString("en")} of ${cell.of.toLocaleString("en")})`)));
    this.find = make("input", { type: "search", placeholder: "number or word", "aria-label": "Find latents by number, or by a word that they promote or that is in their texts" });
    this.kind = make("select", { "aria-label": "Class" });
    this.maskOf = make("select", { "aria-label": "Classes with the mask on or lifted", "data-tip": "Classes in list, map and filter" }, make("option", { value: "" }, "mask on"), make("option", { value: "lifted_" }, "mask lifted"));
    this.task = make("select", { "aria-label": "Probe" });
    this.count = make("span", { class: "note" });
    this.from = make("input", { type: "number", "aria-label": "First position", placeholder: "from" });
    this.to = make("input", { type: "number", "aria-label": "Last position", placeholder: "to" });
    this.clear = make("button", { type: "button", onclick: () => this.brush(null) }, "Clear");
    this.brushed = make("div", { class: "brush" });
    this.map = make("canvas", { class: "map", tabindex: 0, role: "img" });
    this.legend = make("div", { class: "legend" });
    this.mapped = make("div", { class: "mapped" }, this.map, this.legend);
    this.rows = make("div", { class: "rows", tabindex: 0, role: "region", "aria-label": "List of latents" });
    this.head = make("tr"); this.body = make("tbody");
    this.rows.append(make("table", { id: "latent-list" }, make("thead", {}, this.head), this.body));
    this.detail = make("section", { class: "latent", "aria-label": "Selected latent" });
    const pick = make("select", { "aria-label": "Metric in the last column", onchange: event => { this.extra = event.target.value; this.sortBy(this.extra, true); } },
      ...EXTRA.map(key => make("option", { value: key }, METRICS[key][0])));
    this.pick = pick; pick.value = this.extra;
    holder.append(
      make("div", { class: "browse" },
        make("div", { class: "bar" }, this.choice, this.find, this.kind, this.maskOf, this.task),
        make("div", { class: "bar positions" }, make("span", {}, "Active at positions"), this.from, "–", this.to, this.clear, this.brushed),
        this.mapped,
        make("div", { class: "bar" }, this.count, make("label", {}, "Column ", pick), make("button", { type: "button", onclick: () => this.save() }, "CSV")),
        this.rows),
      this.detail);
    this.choice.addEventListener("change", () => this.go({ ...this.cellState(Number(this.choice.value)), p: this.range }, "push"));
    this.maskOf.addEventListener("change", () => { this.listClasses(); this.refilter(); });
    this.find.addEventListener("input", () => this.refilter());
    this.kind.addEventListener("change", () => this.refilter());
    this.task.addEventListener("change", () => { this.setExtra("weight"); this.sort = ["weight", true]; this.weigh(); this.refilter(); });
    for (const input of [this.from, this.to]) input.addEventListener("change", () => { const [from, to] = [Number(this.from.value), Number(this.to.value)]; if (from && to) this.brush([Math.min(from, to), Math.max(from, to)]); });
    this.rows.addEventListener("scroll", () => requestAnimationFrame(() => this.paint()), { passive: true });
    for (const target of [this.rows, this.map]) target.addEventListener("keydown", event => {
      const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
      if (!step || !this.order?.length) return;
      event.preventDefault();
      this.step(step);
    });
    this.map.addEventListener("pointermove", event => { const at = this.nearestDot(event); this.map.style.cursor = at === null ? "" : "pointer"; at === null ? hideTip() : showTip(this.describe(at), { left: event.clientX, right: event.clientX, top: event.clientY - 4, bottom: event.clientY + 12 }); });
    this.map.addEventListener("pointerleave", hideTip);
    this.map.addEventListener("click", event => { const at = this.nearestDot(event); if (at !== null) this.select(at, "push"); });
    addEventListener("popstate", () => { const state = this.fromAddress(); if (!state) return; this.go(state, null); const { top, bottom } = holder.getBoundingClientRect(); if (bottom < 0 || top > innerHeight) holder.scrollIntoView(); });
    let waiting;
    new ResizeObserver(() => { clearTimeout(waiting); waiting = setTimeout(() => { if (this.block) { this.paint(); this.drawMap(); this.drawBrush(); if (this.chosen !== null && this.detail.clientWidth !== this.shownWidth) this.show(this.chosen); } }, 100); }).observe(holder);
    onTheme.push(() => this.block && this.drawMap());
  }

  // Address.
  cellState(index) { return { cell: this.cells[index].cell, seed: this.cells[index].seed }; }
  indexOf({ cell, seed }) {
    const named = entry => entry.cell === cell && (seed === undefined || entry.seed === seed);
    return cell === undefined ? 0 : this.cells.findIndex(named);
  }
  fromAddress() { // null if the address is not of a latent
    if (location.hash && !location.hash.includes("=")) return null;
    const query = new URLSearchParams(location.hash.slice(1)), number = name => query.has(name) ? Number(query.get(name)) : undefined;
    const p = /^(\d+)-(\d+)$/.exec(query.get("p") ?? "");
    return { cell: query.get("cell") ?? undefined, seed: number("seed"), latent: number("latent"), p: p && [Number(p[1]), Number(p[2])] };
  }
  remember(how) {
    const cell = this.cells[Number(this.choice.value)], query = new URLSearchParams({ cell: cell.cell });
    if (this.cells.find(other => other.cell === cell.cell) !== cell) query.set("seed", cell.seed);
    if (this.chosen !== null) query.set("latent", this.block.latent[this.chosen]);
    if (this.range) query.set("p", this.range.join("-"));
    const address = "#" + query.toString();
    if (how && location.hash !== address) history[how + "State"](null, "", address);
  }
  async go(state, how) {
    const index = this.indexOf(state);
    if (index < 0) { this.say(`This page has no latents of ${state.cell}${state.seed === undefined ? "" : `, seed ${state.seed}`}.`); return; }
    if (!(await this.open(index))) return;
    this.setRange(state.p ?? null);
    const at = state.latent === undefined ? this.order[0] : this.rowOf.get(state.latent);
    if (at === undefined) {
      this.chosen = null; this.paint(); this.drawMap();
      this.say(state.latent === undefined ? "No latent is listed." : `Latent ${state.latent} of ${this.block.cell} is not among the ${this.block.latent.length} latents on this page: “posmask report DIR --all” writes all of them.`);
    } else this.select(at, null, true);
    if (how) this.remember(how);
  }
  say(text) { this.detail.replaceChildren(make("p", {}, text)); announce(text); }

  async load(index) {
    const block = await table(this.cells[index].block), texts = await table(block.texts);
    return Object.assign(block, { words: texts.words, token: texts.token, position: texts.position });
  }
  async open(index) {
    this.choice.value = index;
    if (this.shown === index) return true;
    this.holder.setAttribute("aria-busy", true);
    try {
      const block = await this.load(index);
      if (Number(this.choice.value) !== index) return false; // another cell was selected meanwhile
      Object.assign(this, { block, shown: index, texts: null, keys: {}, chosen: null, range: null });
      this.rowOf = new Map([...block.latent].map((latent, at) => [latent, at]));
      this.task.replaceChildren(make("option", { value: "" }, "any probe"), ...block.probes.map((name, at) => make("option", { value: at }, name)));
      this.maskOf.hidden = !block.lifted_class_names; // With the mask on most latents of a mask depend on position by construction.
      this.maskOf.value = block.lifted_class_names ? "lifted_" : "";
      this.listClasses();
      this.mapped.hidden = !block.shift_content;
      if (!block.other_seeds.length && this.extra === "seeds") this.setExtra("where");
      this.weigh(); this.setRange(null);
      this.holder.dispatchEvent(new Event("cell"));
      return true;
    } catch (error) { this.say("The latents of this cell cannot be read: " + error.message); return false; }
    finally { this.holder.removeAttribute("aria-busy"); }
  }
  listClasses() {
    const names = this.classNames();
    this.kind.replaceChildren(make("option", { value: "" }, "any class"), ...names.map(name => make("option", {}, name))); this.kind.hidden = !names.length;
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
    return this.keys[name] ??= Array.from(this.block.latent, (_, at) => METRICS[name][1](this.block, at, this));
  }
  search() { // searchable words of each latent: those it promotes and the active tokens of its texts
    if (this.texts) return this.texts;
    const b = this.block, per = b.text_start.width, width = b.text_value.width / per;
    return this.texts = Array.from(b.latent, (_, at) => {
      const words = [...row(b.promoted, at)].map(word => b.words[word]);
      row(b.text_start, at).forEach((start, n) => { if (start >= 0) for (let t = 0; t < b.text_length[at * per + n]; t++) if (b.text_value[(at * per + n) * width + t]) words.push(b.words[b.token[start + t]]); });
      return words.join("\n").toLowerCase();
    });
  }

  // Positions.
  shareAt(at) { // share of a latent's activation at the selected positions
    if (!this.range) return NaN;
    const profile = row(this.block.profile, at); let all = 0, inside = 0;
    for (let p = 1; p < profile.length; p++) { all += profile[p]; if (p >= this.range[0] && p <= this.range[1]) inside += profile[p]; }
    return all ? inside / all : NaN;
  }
  isActive(at) { // in a bin of the selected positions it fires at least half as often as in any
    const b = this.block, rates = row(b.rate, at); let most = 0, here = 0;
    for (let bin = 0; bin < rates.length; bin++) { most = Math.max(most, rates[bin]); if (b.bin_end[bin] >= this.range[0] && b.bin_start[bin] <= this.range[1]) here = Math.max(here, rates[bin]); }
    return most > 0 && here * 2 >= most;
  }
  setExtra(key) { this.extra = key; this.pick.value = key; }
  setRange(range) {
    const b = this.block, last = b.bin_end.at(-1);
    this.range = range && [Math.max(b.bin_start[0], Math.min(last, range[0])), Math.max(b.bin_start[0], Math.min(last, range[1]))];
    if (this.range && (range[0] > range[1])) this.range = null;
    for (const input of [this.from, this.to]) { input.min = b.bin_start[0]; input.max = last; }
    this.from.value = this.range?.[0] ?? ""; this.to.value = this.range?.[1] ?? ""; this.clear.hidden = !this.range;
    this.keys.share = null;
    if (this.range) { if (this.extra !== "share") this.before = [this.extra, this.sort]; this.setExtra("share"); this.sort = ["share", true]; }
    else if (this.extra === "share") { const [extra, sort] = this.before ?? ["where", ["information", true]]; this.setExtra(extra); this.sort = sort; }
    this.refilter(); this.drawBrush();
  }
  brush(range) {
    this.setRange(range);
    if (this.order.length && !this.order.includes(this.chosen)) this.select(this.order[0], null, true);
    this.remember("push");
    announce(this.range ? `${this.order.length} latents are active at positions ${span(...this.range)}` : "All positions");
  }
  drawBrush() { // how many latents peak in each bin of positions; dragging selects positions
    const b = this.block, width = Math.max(220, this.brushed.clientWidth), height = 46, axis = axisOf(b, 2, width - 2), counts = new Array(axis.n).fill(0);
    for (let at = 0; at < b.latent.length; at++) { const rates = row(b.rate, at); let best = 0; for (let bin = 1; bin < axis.n; bin++) if (rates[bin] > rates[best]) best = bin; if (rates[best]) counts[best]++; }
    const most = Math.max(1, ...counts), svg = SVG("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "Number of latents that fire most in each range of positions; drag to select positions" });
    const base = 32;
    counts.forEach((count, bin) => svg.append(SVG("rect", { x: axis.left(bin), y: base - 28 * count / most, width: Math.max(1, axis.width - 1), height: 28 * count / most, fill: "var(--bar)" })));
    for (const [x, p] of axis.ticks) svg.append(SVG("text", { x, y: height - 2, "text-anchor": "middle" }, p));
    const chosen = SVG("rect", { class: "chosen", y: 1, height: base - 1, x: 0, width: 0 });
    const mark = (from, to) => { chosen.setAttribute("x", axis.left(from)); chosen.setAttribute("width", axis.left(to + 1) - axis.left(from)); };
    if (this.range) mark(axis.binAt(axis.at(this.range[0]) + 0.01), axis.binAt(axis.at(this.range[1]) + 0.01));
    svg.append(chosen);
    const binOf = event => axis.binAt((event.clientX - svg.getBoundingClientRect().left) * width / svg.getBoundingClientRect().width);
    const tell = (from, to) => showTip(`positions ${span(b.bin_start[from], b.bin_end[to])}: ${counts.slice(from, to + 1).reduce((sum, count) => sum + count, 0)} latents fire most here`, svg.getBoundingClientRect());
    let start = null;
    svg.addEventListener("pointerdown", event => { start = binOf(event); svg.setPointerCapture(event.pointerId); mark(start, start); tell(start, start); event.preventDefault(); });
    svg.addEventListener("pointermove", event => { const bin = binOf(event); if (start === null) tell(bin, bin); else { mark(Math.min(start, bin), Math.max(start, bin)); tell(Math.min(start, bin), Math.max(start, bin)); } });
    svg.addEventListener("pointerup", event => { if (start === null) return; const bin = binOf(event), [from, to] = [Math.min(start, bin), Math.max(start, bin)]; start = null; hideTip(); this.brush([b.bin_start[from], b.bin_end[to]]); });
    svg.addEventListener("pointercancel", () => { start = null; this.drawBrush(); });
    svg.addEventListener("pointerleave", () => { if (start === null) hideTip(); });
    this.brushed.replaceChildren(svg);
  }

  // List.
  refilter() {
    const b = this.block, wanted = this.find.value.trim().toLowerCase(); if (!b) return;
    let order = Array.from(b.latent, (_, at) => at);
    if (/^\d+$/.test(wanted)) order = order.filter(at => String(b.latent[at]).startsWith(wanted));
    else if (wanted) { const texts = this.search(); order = order.filter(at => texts[at].includes(wanted)); }
    if (this.kind.value) order = order.filter(at => this.classOf(at) === this.kind.value);
    if (this.task.value !== "") order = order.filter(at => this.weights[at] !== 0);
    if (this.range) order = order.filter(at => this.isActive(at));
    const [name, down] = this.sort, key = this.key(name);
    order.sort((a, b) => { const x = key[a], y = key[b]; if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a - b; return (down ? y - x : x - y) || a - b; });
    this.order = order; this.place = new Map(order.map((at, index) => [at, index]));
    this.count.textContent = `${order.length.toLocaleString("en")} latents`;
    const columns = [["latent"], ["", "profile"], ["rate"], ["information"], ["content"], [this.extra], ["", "promotes"]];
    this.head.replaceChildren(...columns.map(([key, title]) => make("th", { scope: "col", "data-key": key || title, class: key ? null : "text", "aria-sort": key === name ? (down ? "descending" : "ascending") : null },
      key ? make("button", { type: "button", "aria-label": METRICS[key][0], "data-tip": METRICS[key][0], onclick: () => this.sortBy(key) }, SHORT[key] ?? METRICS[key][0]) : title)));
    this.rows.scrollTop = 0; this.paint(); this.drawMap();
  }
  sortBy(name, fresh = false) { this.sort = [name, this.sort[0] === name && !fresh ? !this.sort[1] : !ASCENDING.includes(name)]; this.refilter(); }
  // Classes with the mask on or lifted, whichever is selected.
  classNames() { return this.block[this.maskOf.value + "class_names"] ?? []; }
  classIndex(at) { return this.block[this.maskOf.value + "class"][at]; }
  classOf(at) { return this.classNames()[this.block.class_names && this.classIndex(at)]; }
  paint() { // only visible rows are in the document
    const b = this.block, first = Math.max(0, Math.floor(this.rows.scrollTop / ROW) - 8), last = Math.min(this.order.length, first + Math.ceil(this.rows.clientHeight / ROW) + 16);
    const space = height => make("tr", { "aria-hidden": true }, make("td", { colspan: 7, style: `padding:0;border:0;height:${height}px` }));
    const cell = (key, at) => make("td", {}, METRICS[key][2](METRICS[key][1](b, at, this), b, at));
    const shown = this.order.slice(first, last).map(at => make("tr", { "aria-selected": at === this.chosen, "aria-rowindex": this.place.get(at) + 2, onclick: () => this.select(at, "push") },
      make("td", {}, make("i", { class: "dot", style: `background:${CLASS_COLORS[this.classOf(at)] ?? "var(--bar)"}` }), String(b.latent[at])), make("td", {}, spark(b, at)),
      cell("rate", at), cell("information", at), cell("content", at), cell(this.extra, at),
      make("td", { class: "text" }, ...[...row(b.promoted, at).slice(0, 4)].map(word => make("bdi", {}, spaced(b.words[word]))))));
    this.body.replaceChildren(...(first ? [space(first * ROW)] : []), ...shown, ...(last < this.order.length ? [space((this.order.length - last) * ROW)] : []));
    this.rows.firstChild.setAttribute("aria-rowcount", this.order.length + 1);
  }
  step(by) { this.select(this.order[Math.max(0, Math.min(this.order.length - 1, (this.place.get(this.chosen) ?? -1) + by))], "replace", true); }
  select(at, how, scroll = false) {
    this.chosen = at;
    if (scroll) { const y = (this.place.get(at) ?? 0) * ROW; if (y < this.rows.scrollTop || y > this.rows.scrollTop + this.rows.clientHeight - 3 * ROW) this.rows.scrollTop = Math.max(0, y - 3 * ROW); }
    this.paint(); this.drawMap(); this.show(at);
    if (how) this.remember(how);
    announce(`Latent ${this.block.latent[at]} of ${this.block.cell}: ${this.describe(at)}`);
  }

  // Map: information of firing about position against the share of content in the shift design.
  drawMap() {
    const b = this.block; if (!b.shift_content) return;
    const canvas = this.map, width = canvas.clientWidth, height = canvas.clientHeight, scale = devicePixelRatio || 1; if (!width) return;
    canvas.width = width * scale; canvas.height = height * scale;
    const paper = canvas.getContext("2d"), style = getComputedStyle(canvas), colour = name => style.getPropertyValue(name.slice(4, -1)).trim();
    paper.scale(scale, scale); paper.font = "11px system-ui, sans-serif";
    const left = 44, right = width - 8, top = 8, base = height - 46, none = height - 32;
    const most = Math.max(0.05, ...b.position_information.filter(Number.isFinite));
    const x = value => Number.isFinite(value) ? left + 14 + (right - left - 14) * Math.sqrt(Math.max(0, value) / most) : left, y = value => Number.isFinite(value) ? base - (base - top) * Math.max(0, Math.min(1, value)) : none;
    paper.strokeStyle = style.getPropertyValue("--line"); paper.fillStyle = style.getPropertyValue("--soft"); paper.lineWidth = 1;
    for (const tick of [0, 0.5, 1]) { paper.beginPath(); paper.moveTo(left, y(tick)); paper.lineTo(right, y(tick)); paper.stroke(); paper.textAlign = "right"; paper.fillText(tick.toFixed(1), left - 8, y(tick) + 4); }
    paper.fillText("none", left - 8, none + 4); paper.textAlign = "center";
    for (const share of [0, 0.1, 0.4, 1]) paper.fillText((share * most).toFixed(2), Math.min(right - 12, x(share * most)), height - 17);
    paper.fillText("position information (square-root scale)", (left + right) / 2, height - 4);
    paper.save(); paper.translate(10, (top + base) / 2); paper.rotate(-Math.PI / 2); paper.fillText("content share", 0, 0); paper.restore();
    this.dots = Float32Array.from({ length: 2 * b.latent.length }, (_, index) => index % 2 ? y(b.shift_content[index >> 1]) : x(b.position_information[index >> 1]));
    const names = this.classNames(), colors = names.map(name => colour(CLASS_COLORS[name] ?? "var(--bar)")), few = b.latent.length > 5000;
    const dot = (at, radius) => { paper.beginPath(); paper.arc(this.dots[2 * at], this.dots[2 * at + 1], radius, 0, 7); };
    paper.fillStyle = style.getPropertyValue("--line"); for (let at = 0; at < b.latent.length; at++) if (!this.place.has(at)) { dot(at, 1.5); paper.fill(); }
    paper.globalAlpha = few ? 0.5 : 0.75;
    for (const at of this.order) { paper.fillStyle = names.length ? colors[this.classIndex(at)] : colour("var(--bar)"); dot(at, few ? 1.8 : 3); paper.fill(); }
    paper.globalAlpha = 1;
    if (this.chosen !== null) { paper.strokeStyle = style.getPropertyValue("--ink"); paper.lineWidth = 2; dot(this.chosen, 6); paper.stroke(); }
    const counts = names.map((_, index) => this.order.reduce((sum, at) => sum + (this.classIndex(at) === index), 0));
    this.legend.replaceChildren(...names.map((name, index) => make("span", {}, make("i", { class: "dot", style: `background:${CLASS_COLORS[name] ?? "var(--bar)"}` }), `${name} ${counts[index].toLocaleString("en")}`)), make("span", {}, "none: fires too rarely in the shift design"));
    canvas.setAttribute("aria-label", `Map of ${this.order.length} latents: position information (horizontal) against content share (vertical). The arrow keys move through the list.`);
  }
  nearestDot(event) {
    const box = this.map.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top; let best = null, least = event.pointerType === "touch" ? 400 : 144;
    for (const at of this.order ?? []) { const away = (this.dots[2 * at] - x) ** 2 + (this.dots[2 * at + 1] - y) ** 2; if (away < least) { least = away; best = at; } }
    return best;
  }
  describe(at) {
    const b = this.block, words = [...row(b.promoted, at).slice(0, 3)].map(word => spaced(b.words[word])).join(" ");
    return `latent ${b.latent[at]}${this.classOf(at) ? ", " + this.classOf(at) : ""}: fires on ${METRICS.rate[2](b.firings[at] / b.tokens)}, position information ${digits(b.position_information[at])}, content share ${METRICS.content[2](METRICS.content[1](b, at))}; promotes ${words}`;
  }

  // The selected latent.
  show(at) {
    const b = this.block, fact = (name, ...value) => make("li", { "data-tip": MEANINGS[name] }, name + " ", make("b", {}, ...value)), kind = b.kind_names?.[b.kind[at]];
    const interval = (low, high) => low && Number.isFinite(low[at]) ? ` (${digits(low[at])} to ${digits(high[at])})` : "";
    const serves = (this.serves.get(at) ?? []).sort((a, b) => a[1] - b[1]).slice(0, 3).map(([probe, choice, weight]) => `${b.probes[probe]} (choice ${choice}, ${signed(weight, size => size.toPrecision(2))})`);
    this.shownWidth = this.detail.clientWidth;
    const name = b.class_names?.[b.class[at]], lifted = b.lifted_class_names?.[b.lifted_class[at]];
    const texts = make("div", { class: "texts" }), profile = make("div"), histogram = make("div"), strip = make("div"), cards = make("div", { class: "relatives" });
    this.detail.replaceChildren(
      make("header", {},
        make("h3", {}, `Latent ${b.latent[at]} of ${b.cell}`),
        name ? make("span", { class: "class", style: `border-color:${CLASS_COLORS[name]}` }, name + (kind ? ", " + kind : "") + (lifted && lifted !== name ? `; mask lifted: ${lifted}` : "")) : null,
        make("span", { class: "steps" }, make("button", { type: "button", "aria-label": "Previous latent", onclick: () => this.step(-1) }, "‹"), make("button", { type: "button", "aria-label": "Next latent", onclick: () => this.step(1) }, "›"),
          make("button", { type: "button", onclick: () => this.copy() }, "Copy link")),
        make("ul", { class: "facts", "data-strip": "", "aria-label": "Facts" }, fact("fires on", `${percent(b.firings[at] / b.tokens)} of ${b.tokens.toLocaleString("en")} tokens`), fact("position information", digits(b.position_information[at]) + interval(b.position_share_low, b.position_share_high)),
          Number.isFinite(b.shift_content?.[at]) ? fact("shift design:", `content ${digits(b.shift_content[at], 2)}, position ${digits(b.shift_position[at], 2)}, interaction ${digits(b.shift_interaction[at], 2)}`) : null,
          fact("retention", `${digits(b.retention[at], 2)}, chance ${digits(b.retention_chance[at], 2)}`), fact("mask open", openRanges(row(b.openness, at)).text), serves.length ? fact("probes", serves.join("; ")) : null)),
      make("div", { class: "main" }, profile, texts),
      make("div", { class: "side" }, this.words(at), histogram, strip),
      cards);
    profile.append(...this.profile(at, profile.clientWidth));
    texts.append(...this.excerpts(at));
    if (b.histogram) histogram.append(make("h4", {}, "Activations"), this.histogram(at, histogram.clientWidth));
    if (b.shift_piece) strip.append(...this.strip(at));
    this.relatives(at, cards);
  }
  async copy() {
    this.remember("replace");
    try { await navigator.clipboard.writeText(location.href); announce("The link is copied"); } catch { announce("The address of this page is the link"); }
  }
  profile(at, wide) {
    const b = this.block, n = b.bin_start.length, width = Math.max(260, wide), height = 146, left = 46, base = 101, top = 8, axis = axisOf(b, left, width - 8);
    const parts = ["rate", "lifted_rate"].filter(name => b[name]), isRate = b.profiled === "firing rate", shown = isRate ? percent : value => value.toPrecision(3);
    const highs = parts.flatMap(name => b[name + "_high"] ? [...row(b[name + "_high"], at)] : []).map(value => value / 65535 * b.rate_top[at]), tops = parts.flatMap(name => [...row(b[name], at)]).map(value => value / 65535 * b.rate_top[at]);
    const most = Math.min(2 * Math.max(...tops), Math.max(...tops, ...highs)) || 1, y = value => base - (base - top) * Math.min(1, value / most);
    const svg = SVG("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "profile", role: "group", "data-strip": "", "aria-label": `${b.profiled} by position` });
    for (const tick of niceTicks(most)) svg.append(SVG("path", { d: `M${left} ${y(tick)}H${width - 8}`, stroke: "var(--line)" }), SVG("text", { x: left - 5, y: y(tick) + 4, "text-anchor": "end" }, isRate ? Number((100 * tick).toPrecision(3)) + " %" : Number(tick.toPrecision(3))));
    for (const name of parts) {
      const value = (end, bin) => rateOf(b, name + end, at, bin), kind = name === "rate" ? "" : " lifted"; let line = "", band = "";
      for (let bin = 0; bin < n; bin++) line += `${bin ? "L" : "M"}${axis.middle(bin).toFixed(1)} ${y(value("", bin)).toFixed(1)}`;
      if (b[name + "_low"]) {
        for (let bin = 0; bin < n; bin++) band += `${bin ? "L" : "M"}${axis.middle(bin).toFixed(1)} ${y(value("_high", bin)).toFixed(1)}`;
        for (let bin = n - 1; bin >= 0; bin--) band += `L${axis.middle(bin).toFixed(1)} ${y(value("_low", bin)).toFixed(1)}`;
        svg.append(SVG("path", { class: "band" + kind, d: band + "Z" }));
      }
      svg.append(SVG("path", { class: "line" + kind, d: line }));
    }
    const open = row(b.openness, at);
    svg.append(SVG("rect", { x: left, y: base + 8, width: width - 8 - left, height: 7, fill: "var(--closed)" }));
    for (let p = 1; p < open.length; p++) if (open[p] && p <= b.bin_end[n - 1]) svg.append(SVG("rect", { x: axis.at(p).toFixed(2), width: (axis.at(p + 1) - axis.at(p) + 0.3).toFixed(2), y: base + 8, height: 7, fill: "var(--open)", "fill-opacity": (open[p] / 255).toFixed(2) }));
    svg.append(SVG("text", { x: left - 5, y: base + 15, "text-anchor": "end" }, "mask"));
    for (const [x, p] of axis.ticks) svg.append(SVG("text", { x, y: base + 27, "text-anchor": "middle" }, p));
    svg.append(SVG("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, "position in the context (bins drawn equally wide)"));
    for (let bin = 0; bin < n; bin++) {
      const told = name => { const value = end => shown(rateOf(b, name + end, at, bin)); return value("") + (b[name + "_low"] ? ` (${value("_low")} to ${value("_high")})` : ""); };
      const positions = Array.from(open.slice(b.bin_start[bin], b.bin_end[bin] + 1)), where = b.bin_start[bin] === b.bin_end[bin] ? "position " : "positions ";
      svg.append(SVG("rect", { class: "hit", x: axis.left(bin), y: top, width: axis.width, height: base + 16 - top, "data-tip": `${where}${span(b.bin_start[bin], b.bin_end[bin])}: ${b.profiled} ${told("rate")}${b.lifted_rate ? `, ${LIFTED} ${told("lifted_rate")}` : ""}; mask ${digits(positions.length ? mean(positions) / 255 : NaN, 2)} open` }));
    }
    const key = (kind, text) => make("span", {}, make("i", { class: "key " + kind }), text);
    const origin = b.position_origin === "context" ? "" : ` The mask counts positions from ${FROM[b.position_origin]}.`;
    return [make("h4", {}, isRate ? "Firing rate" : "Mean activation", make("span", { class: "keys" }, key("on", b.lifted_rate ? "mask on" : isRate ? "firing rate" : "mean activation"), b.lifted_rate ? key("lifted", "mask lifted") : null, b.rate_low ? key("interval", "95 % interval") : null, key("open", "mask open"), origin)), svg];
  }
  excerpts(at) {
    const b = this.block, per = b.text_start.width, width = b.text_value.width / per, { strongest, quantiles = [], positions = [] } = b.excerpts;
    const groups = [["Strongest, one per text", Array.from({ length: strongest }, (_, n) => "")], ["At quantiles of its activation", quantiles.map(q => "q " + q.toFixed(2))], ["Strongest by position", positions.map(([from, to]) => span(from, to))]];
    const grid = make("div", { class: "excerpts", role: "group", "aria-label": "Texts", "data-strip": "" }); let n = 0;
    for (const [title, tags] of groups) {
      const lines = tags.map(tag => this.excerpt(at, n++, tag, per, width)).filter(Boolean);
      if (lines.length) grid.append(make("h4", {}, title, grid.children.length ? null : make("span", { class: "keys" }, `of ${b.searched.toLocaleString("en")} held-out tokens; @ position, activation`)), ...lines);
    }
    if (!grid.children.length) return [make("p", { class: "note" }, "It fired on none of the searched tokens.")];
    return [grid];
  }
  excerpt(at, n, tag, per, width) {
    const b = this.block, start = b.text_start[at * per + n], length = b.text_length[at * per + n]; if (start < 0) return null;
    const values = row(b.text_value, at).subarray(n * width, n * width + length), peak = b.text_peak ? b.text_peak[at * per + n] : values.indexOf(Math.max(...values));
    const tokens = Array.from({ length }, (_, t) => this.token(b.token[start + t], values[t] / 255, b.largest[at], b.position[start + t], t === peak));
    return make("div", { class: "excerpt", "data-row": "", onclick: event => event.currentTarget.classList.toggle("wrapped") }, make("span", { class: "tag" }, tag), make("span", { class: "tag" }, "@" + b.position[start + peak]), make("b", {}, activation(values[peak] / 255 * b.largest[at])),
      make("span", { class: "kwic" }, make("span", { class: "before" }, make("span", {}, ...tokens.slice(0, peak))), tokens[peak], make("span", { class: "after" }, ...tokens.slice(peak + 1))));
  }
  token(word, share, largest, position, isPeak) {
    const text = word < 0 ? "(attention sink)" : this.block.words[word], where = position === null ? "" : `, position ${position}`;
    const token = make("bdi", { class: isPeak ? "peak" : null, "data-tip": `${spaced(text)}: activation ${share ? activation(share * largest) : 0}${where}` }, isPeak && text.trim() !== text ? spaced(text) : text);
    if (share) token.style.setProperty("--a", Math.round(12 + 78 * share) + "%");
    return token;
  }
  words(at) {
    const b = this.block, list = (title, ids, logits) => make("div", {}, make("h4", {}, title), make("ul", { class: "words" }, ...[...row(ids, at)].slice(0, 8).map((word, index) => make("li", {}, make("bdi", {}, spaced(b.words[word])), make("small", {}, signed(logits[at * logits.width + index], size => size.toFixed(1)))))));
    return make("div", { class: "pair" }, list("Promotes (logits)", b.promoted, b.promoted_logit), list("Suppresses", b.suppressed, b.suppressed_logit));
  }
  histogram(at, wide) {
    const b = this.block, counts = row(b.histogram, at), most = Math.max(1, ...counts), width = Math.max(180, wide), height = 84, left = 40, base = 56, step = (width - left - 6) / counts.length;
    const svg = SVG("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "profile", role: "group", "data-strip": "", "aria-label": "Histogram of activations" });
    counts.forEach((count, bin) => {
      const edge = n => activation(n / counts.length * b.largest[at]);
      svg.append(SVG("rect", { x: left + step * bin, y: base - 48 * count / most, width: step - 1, height: 48 * count / most, fill: "var(--bar)" }),
        SVG("rect", { class: "hit", x: left + step * bin, y: 6, width: step, height: base - 6, "data-tip": `activation ${bin ? edge(bin) : 0} to ${edge(bin + 1)}: ${count.toLocaleString("en")} tokens` }));
    });
    svg.append(SVG("path", { d: `M${left} ${base}H${width - 6}`, stroke: "var(--line)" }), SVG("text", { x: left - 5, y: 12, "text-anchor": "end" }, most.toLocaleString("en")), SVG("text", { x: left - 5, y: base, "text-anchor": "end" }, "0"),
      SVG("text", { x: left, y: base + 13 }, "0"), SVG("text", { x: width - 6, y: base + 13, "text-anchor": "end" }, activation(b.largest[at])), SVG("text", { x: (left + width) / 2, y: height - 2, "text-anchor": "middle" }, "activation; bars count tokens"));
    return svg;
  }
  strip(at) { // the strongest piece of the shift design in each window
    const b = this.block, piece = b.shift_piece[at], windows = b.shift_windows, n = b.shift_value.width / windows.length, length = b.shift_token.width;
    const title = make("h4", {}, "One text moved along the context");
    if (piece < 0) return [title, make("p", { class: "note" }, "It fires nowhere in the shift design.")];
    const value = (window, t) => b.shift_value[(at * windows.length + window) * n + t], start = b.shift_start[at], words = Array.from({ length: n }, (_, t) => b.shift_token[piece * length + start + t]);
    const grid = make("div", { class: "moved", role: "group", "aria-label": "Activations by window", "data-strip": "" }, ...windows.map(([from], window) => make("div", { "data-row": "" }, make("span", { class: "tag" }, "@" + (from + start)),
      ...words.map((word, t) => make("i", { style: `--a:${Math.round(100 * value(window, t) / 255)}%`, "data-tip": `${word < 0 ? "(attention sink)" : spaced(b.words[word])} at position ${from + start + t}: activation ${value(window, t) ? activation(value(window, t) / 255 * b.shift_largest[at]) : 0}` })))));
    const best = words.map((_, t) => Math.max(...windows.map((_, window) => value(window, t)))), peak = best.indexOf(Math.max(...best));
    return [title, grid, make("p", { class: "piece" }, ...words.map((word, t) => this.token(word, best[t] / 255, b.shift_largest[at], null, t === peak)))];
  }

  // Copies in the same SAE, and the nearest latents elsewhere.
  relatives(at, holder) {
    const b = this.block, here = this.shown, seen = [], line = (name, cosines) => b[cosines]?.width ? [...row(b[name], at)].map((latent, n) => [latent, row(b[cosines], at)[n], n]) : [];
    const own = line("near_own", "near_own_cosine").filter(([, cosine]) => cosine >= b.near).map(([latent, cosine]) => ({ cell: here, latent, cosine }));
    const elsewhere = [
      ...line("seed_latent", "seed_cosine").map(([latent, cosine, n]) => ({ cell: this.cells.findIndex(entry => entry.cell === b.cell && entry.seed === b.other_seeds[n]), latent, cosine, label: `seed ${b.other_seeds[n]}` })),
      ...line("near_latent", "near_cosine").map(([latent, cosine, n]) => ({ cell: row(b.near_cell, at)[n], latent, cosine }))].filter(({ cosine }) => cosine >= b.near);
    const windows = own.filter(({ cosine }) => cosine > b.copy), center = ({ latent }) => { const kept = this.rowOf.get(latent); return kept === undefined ? Infinity : openRanges(row(b.openness, kept)).center; };
    const family = windows.length ? [{ cell: here, latent: b.latent[at], cosine: 1 }, ...windows].sort((x, y) => center(x) - center(y)) : [];
    const group = (title, cards, grow) => { if (cards.length) seen.push(make("div", { class: "relation", style: `flex-grow:${Math.min(grow, cards.length)}` }, make("h4", {}, title), make("div", { class: "cards", tabindex: 0, role: "group", "aria-label": title }), make("p", { class: "note absent" }))); this.fill(seen.at(-1), cards, at); };
    group(`Copies in this SAE (cosine > ${b.copy})`, family, 4);
    group(`Nearest elsewhere (cosine > ${b.near})`, elsewhere, 2);
    group(`${windows.length ? "Others" : "Nearest"} in this SAE (cosine > ${b.near})`, own.filter(card => !windows.includes(card)), 2);
    holder.replaceChildren(...(seen.length ? seen : [make("p", { class: "note" }, `No other latent on this page or in another seed has a decoder cosine above ${b.near}.`)]));
  }
  async fill(relation, cards, at) { // a card for each latent on this page, and one line for the others
    const loaded = await Promise.all(cards.map(({ cell }) => this.cells[cell] ? this.load(cell).catch(() => null) : null)), absent = [];
    cards.forEach((card, n) => {
      const index = loaded[n] ? [...loaded[n].latent].indexOf(card.latent) : -1;
      if (index >= 0) $(".cards", relation).append(this.card(card, at, loaded[n], index));
      else absent.push(`${card.label ?? (card.cell === this.shown ? "" : this.cells[card.cell].cell)} ${card.latent} (${digits(card.cosine, 2)})`.trim());
    });
    $(".cards", relation).hidden = absent.length === cards.length;
    $(".absent", relation).textContent = absent.length ? `Not on this page: ${absent.join(", ")}` : "";
  }
  card({ cell, latent, cosine, label }, at, b, index) {
    const entry = this.cells[cell], isSelf = cell === this.shown && latent === this.block.latent[at];
    const inside = make("span", { class: "inside" }), title = [make("i", { class: "dot", style: `background:${this.colors[entry.cell] ?? "var(--soft)"}` }), make("b", {}, isSelf ? "this latent" : `latent ${latent}`), make("span", { class: "where" }, isSelf || cell === this.shown ? "" : label ?? entry.cell), isSelf ? "" : make("span", { class: "cosine" }, digits(cosine, 2))];
    inside.append(make("span", { class: "line" }, spark(b, index, 84, 24), make("small", {}, openRanges(row(b.openness, index)).text.replace("everywhere", "open").replace(/^(\d)/, "at $1"))), ...[0, 1].map(n => this.snippet(b, index, n)).filter(Boolean));
    return make(isSelf ? "div" : "button", { class: "card", ...(isSelf ? {} : { type: "button", onclick: () => this.go({ ...this.cellState(cell), latent, p: this.range }, "push") }) }, make("span", { class: "title" }, ...title), inside);
  }
  snippet(b, at, n) { // the strongest token of a text with its neighbors
    const per = b.text_start.width, width = b.text_value.width / per, start = b.text_start[at * per + n]; if (start < 0) return null;
    const values = row(b.text_value, at).subarray(n * width, (n + 1) * width), peak = values.indexOf(Math.max(...values.subarray(0, b.text_length[at * per + n])));
    const word = t => b.words[b.token[start + t]], range = (from, to) => Array.from({ length: Math.max(0, to - from) }, (_, t) => word(from + t)).join("");
    return make("span", { class: "snippet" }, make("bdi", {}, range(Math.max(0, peak - 4), peak)), make("mark", {}, make("bdi", {}, spaced(word(peak)))), make("bdi", {}, range(peak + 1, Math.min(b.text_length[at * per + n], peak + 4))));
  }
  save() {
    const b = this.block, keys = Object.keys(METRICS).filter(key => key !== "share" || this.range);
    const value = (key, at) => key === "where" ? METRICS.where[2](null, b, at) : METRICS[key][1](b, at, this);
    const named = kind => at => b[kind + "class_names"]?.[b[kind + "class"][at]] ?? "", classes = b.lifted_class_names ? [named(""), named("lifted_")] : [named("")];
    const lines = this.order.map(at => [...keys.map(key => value(key, at)), ...classes.map(name => name(at)), [...row(b.promoted, at)].map(word => b.words[word].trim()).join("  ")]);
    save(`${pageName}-latents-${b.cell}.csv`.replace(/[^\w.-]+/g, "-"), "text/csv", csv([[...keys.map(key => METRICS[key][0]), "class", ...(classes[1] ? ["class, mask lifted"] : []), "promotes"], ...lines]));
  }
}
let latentApp = null;
function startLatents(cells, colors) {
  const holder = $("#app"), app = latentApp = new Latents(holder, cells, colors), state = app.fromAddress();
  // The list is filled when it is near the viewport, or at once for an address of a latent, which stays in view while the
  // charts above are drawn.
  if (location.hash.includes("=") && state) {
    const leave = new AbortController(), shown = () => state.latent !== undefined && matchMedia("(max-width: 46rem)").matches ? app.detail : holder, growth = new ResizeObserver(() => shown().scrollIntoView());
    for (const name of ["wheel", "pointerdown", "keydown"]) addEventListener(name, () => { growth.disconnect(); leave.abort(); }, { signal: leave.signal });
    app.go(state, null).then(() => { shown().scrollIntoView(); growth.observe(document.body); });
  }
  else new IntersectionObserver((entries, observer) => { if (entries.some(entry => entry.isIntersecting)) { observer.disconnect(); fillLatents(); } }, { rootMargin: "400px" }).observe(holder);
}
// Also called when all charts are drawn, so that print shows latents.
function fillLatents() { if (latentApp && latentApp.shown === undefined && !location.hash.includes("=")) latentApp.go({}, null); }
