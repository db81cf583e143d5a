"use strict";
// Blocks are decoded on first use. Text from data is only ever set as text, never as HTML.
const $ = (query, from = document) => from.querySelector(query);
const $$ = (query, from = document) => [...from.querySelectorAll(query)];
function make(tag, attributes = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...inside.filter(child => child !== null));
  return element;
}
const announce = text => { $("#status").textContent = text; };

// Values on hover, touch and focus: an element with data-tip shows it. In a [data-strip], which is one stop of the Tab key,
// arrow keys move between such elements, and between its rows ([data-row]).
const tip = make("div", { id: "tip", hidden: "" });
document.body.append(tip);
function showTip(text, box) {
  tip.textContent = text; tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect(), x = (box.left + box.right) / 2 - width / 2, above = box.top - height - 6;
  tip.style.left = Math.max(4, Math.min(innerWidth - width - 4, x)) + "px"; tip.style.top = (above > 4 ? above : box.bottom + 6) + "px";
}
function hideTip() { tip.hidden = true; }
const tipped = event => event.target.closest?.("[data-tip]");
for (const name of ["pointerover", "pointerdown"]) document.addEventListener(name, event => { const on = tipped(event); if (on) showTip(on.dataset.tip, on.getBoundingClientRect()); else if (event.pointerType !== "touch" || name === "pointerdown") hideTip(); });
document.addEventListener("focusin", event => {
  const on = tipped(event), strip = event.target.closest("[data-strip]"); if (!on) { hideTip(); return; }
  showTip(on.dataset.tip, on.getBoundingClientRect()); announce(on.dataset.tip);
  if (strip) for (const other of $$("[data-tip][tabindex='0']", strip)) if (other !== on) other.setAttribute("tabindex", -1);
  if (strip) on.setAttribute("tabindex", 0);
});
document.addEventListener("focusout", hideTip);
addEventListener("scroll", hideTip, { capture: true, passive: true });
document.addEventListener("keydown", event => {
  if (event.key === "Escape") hideTip();
  const on = tipped(event), strip = on?.closest("[data-strip]"), [across, down] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key] ?? [0, 0];
  if (!strip || !(across || down)) return;
  event.preventDefault();
  const ofRows = strip.hasAttribute("data-rows") ? "tbody tr:not([hidden]):not(.heading)" : "[data-row]", rows = $$(ofRows, strip), line = on.closest(ofRows) ?? strip, inLine = $$("[data-tip]", line);
  let next = inLine[inLine.indexOf(on) + across];
  if (down) { const other = rows[rows.indexOf(line) + down], found = other && $$("[data-tip]", other); next = found && ($(".peak", other) ?? found[Math.min(found.length - 1, inLine.indexOf(on))]); }
  if (next) { next.setAttribute("tabindex", 0); next.focus({ preventScroll: false }); }
});
// The first value of each strip can be reached by the Tab key.
function setStrips() { for (const strip of $$("[data-strip]:not([data-set])")) { strip.setAttribute("data-set", ""); $$("[data-tip]", strip).forEach((element, at) => element.setAttribute("tabindex", at ? -1 : 0)); } }
setStrips();
new MutationObserver(setStrips).observe(document.body, { childList: true, subtree: true });

const blocks = new Map();
async function unzip(name) {
  const holder = document.getElementById("block-" + name);
  let bytes;
  if (holder) { const text = atob(holder.textContent.trim()); bytes = new Uint8Array(text.length); for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i); }
  else { const answer = await fetch("data/" + name + ".gz"); if (!answer.ok) throw new Error("data/" + name + ".gz: " + answer.status); bytes = await answer.arrayBuffer(); }
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}
function once(key, load) { if (!blocks.has(key)) blocks.set(key, load()); return blocks.get(key); }
const json = name => once("json " + name, async () => JSON.parse(new TextDecoder().decode(await unzip(name))));
const KINDS = { int32: Int32Array, uint16: Uint16Array, uint8: Uint8Array, float32: Float32Array };
const table = name => once("table " + name, async () => {
  const bytes = await unzip(name), length = new DataView(bytes).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 4, length)));
  for (const [key, { type, shape, at }] of Object.entries(header.arrays)) {
    header[key] = new KINDS[type](bytes, 4 + length + at, shape.reduce((product, n) => product * n, 1));
    header[key].width = shape.slice(1).reduce((product, n) => product * n, 1);
  }
  return header;
});
const row = (array, number) => array.subarray(number * array.width, (number + 1) * array.width);
const digits = (value, n = 3) => { const text = Number.isFinite(value) ? value.toFixed(n) : "–"; return text.replace("-", Number(text) === 0 ? "" : "−"); }; // what reads as zero has no sign
function save(name, type, content) {
  const link = make("a", { href: typeof content === "string" && content.startsWith("data:") ? content : URL.createObjectURL(new Blob([content], { type })), download: name });
  document.body.append(link); link.click(); link.remove();
}
// A spreadsheet would run text that begins like a formula.
const quoted = value => { let text = String(value ?? ""); if (/^[=+@\t\r]/.test(text) || (text.startsWith("-") && isNaN(text))) text = "'" + text; return /[",\n\r]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text; };
const csv = lines => lines.map(line => line.map(quoted).join(",")).join("\n") + "\n";
const pageName = document.title.replace(/[^\w.-]+/g, "-");

// Tables: sort, filter, save.
function sortable(sorted) {
  const heads = $$("thead tr:last-child th", sorted);
  heads.forEach((head, index) => {
    const button = make("button", { type: "button" }); button.append(...head.childNodes); head.append(button);
    if (head.hasAttribute("aria-label")) { button.setAttribute("aria-label", head.getAttribute("aria-label")); head.removeAttribute("aria-label"); }
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending" && (index > 0 || head.getAttribute("aria-sort") === "ascending");
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = line => { const cell = line.children[index], value = cell.dataset.value; return value === undefined ? cell.textContent.trim() : value === "" || value === "nan" ? null : Number(value); };
      for (const body of sorted.tBodies) { // rows stay in their group
        const order = [...body.rows].filter(line => !line.matches(".heading")).map((line, at) => [key(line), at, line]).sort(([a, i], [b, j]) => {
          if (a === null || b === null) return (a === null) - (b === null) || i - j;
          const by = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
          return (down ? -by : by) || i - j;
        });
        body.append(...order.map(([, , line]) => line));
      }
      announce("Sorted by " + button.textContent);
    });
  });
}
$$("table.sortable").forEach(sortable);
function refilter(id) {
  const words = ($(`[data-filter="${id}"]`)?.value ?? "").toLowerCase().split(/\s+/).filter(Boolean), only = $(`[data-only="${id}"]`)?.checked;
  let shown = 0;
  for (const body of document.getElementById(id).tBodies) {
    const lines = [...body.rows], heading = lines.find(line => line.matches(".heading"));
    for (const line of lines.filter(line => line !== heading)) {
      const text = (heading ? heading.textContent + " " : "").concat(line.textContent).toLowerCase();
      line.hidden = !words.every(word => text.includes(word)) || (only && !$(".better, .worse", line)) || (line.dataset.pooling === "fair" && !$(`[data-fair="${id}"]`)?.checked);
      shown += !line.hidden;
    }
    if (heading) heading.hidden = lines.every(line => line === heading || line.hidden);
  }
  announce(shown + " rows");
}
$$("[data-filter]").forEach(input => input.addEventListener("input", () => refilter(input.dataset.filter)));
$$("[data-only]").forEach(input => input.addEventListener("change", () => refilter(input.dataset.only)));
$$("[data-fair]").forEach(input => { input.addEventListener("change", () => refilter(input.dataset.fair)); refilter(input.dataset.fair); });
$$("[data-csv]").forEach(button => button.addEventListener("click", () => {
  const saved = document.getElementById(button.dataset.csv);
  const named = $$("thead tr:last-child th", saved).map(head => ($("button", head)?.getAttribute("aria-label") ?? head.textContent).trim());
  // The interval below a number becomes a separate column.
  const lines = [...saved.tBodies].flatMap(body => [...body.rows]).filter(line => !line.hidden && !line.matches(".heading")), ranged = named.map((_, index) => lines.some(line => $(".i, small", line.children[index])));
  const textOf = cell => [...cell.childNodes].filter(node => !node.matches?.("small")).map(node => node.textContent).join("").trim();
  const cells = line => [...line.children].flatMap((cell, index) => [cell.dataset.value ?? textOf(cell), ...(ranged[index] ? [$(".i, small", cell)?.textContent ?? ""] : [])]);
  save(`${pageName}-${saved.id}.csv`, "text/csv", csv([named.flatMap((name, index) => ranged[index] ? [name, name + ", interval"] : [name]), ...lines.map(cells)]));
}));

// A narrow screen has room for one column of a table; probes are on one of two numbers of latents.
for (const select of $$("[data-column-of]")) select.addEventListener("change", () => {
  for (const { cells } of document.getElementById(select.dataset.columnOf).rows) for (const cell of cells) cell.classList.toggle("shown", cell.cellIndex === Number(select.value));
});
for (const select of $$("[data-k-of]")) select.addEventListener("change", () => { document.getElementById(select.dataset.kOf).dataset.k = select.value; });

// A link to details opens them.
for (const link of $$("a[href^='#']")) link.addEventListener("click", () => { const details = document.getElementById(link.hash.slice(1)); if (details?.matches("details")) details.open = true; });

// Explanations are printed; wide tables of details are not.
addEventListener("beforeprint", () => { for (const details of $$("details[data-print]")) details.open = true; });

// The height of the navigation, below which heads stay and addresses end.
new ResizeObserver(() => document.documentElement.style.setProperty("--nav", $("nav").offsetHeight + "px")).observe($("nav"));

// Light and dark theme.
const theme = $("#theme"), onTheme = [];
function nameTheme(isDark) { theme.textContent = isDark ? "Light mode" : "Dark mode"; }
function setTheme(isDark) {
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  nameTheme(isDark); drawn.forEach(holder => draw(holder)); onTheme.forEach(redraw => redraw());
}

// Charts are drawn when they are near the viewport, and the others in idle time, so that none is blank in print.
const drawn = new Set(), views = new Map();
let ready = null; // what drawing waits for
function loadVega() {
  return once("vega", async () => {
    const code = new TextDecoder().decode(await unzip("vega"));
    await new Promise((resolve, reject) => {
      window.vegaReady = resolve;
      document.head.append(make("script", { type: "module", onerror: reject }, code + "\n;window.vegaReady();"));
    });
  });
}
// The script of a page follows this one and defines adaptedToPage(spec, holder).
function adapted(spec, holder) {
  spec = adaptedToPage(structuredClone(spec), holder);
  if (holder.clientWidth < 560 && spec.encoding?.color?.legend !== null && spec.encoding?.color?.field !== "cell") {
    for (const layer of (spec.vconcat ?? [spec]).flatMap(part => part.layer ?? [part])) for (const channel of ["color", "shape", "strokeDash"])
      if (layer.encoding?.[channel]?.field && layer.encoding[channel].legend !== null) layer.encoding[channel].legend = { labelLimit: holder.clientWidth - 60, ...layer.encoding[channel].legend, orient: "top", columns: Math.min(2, layer.encoding[channel].legend?.columns ?? 2) };
  }
  if (spec.usermeta?.columns) spec.columns = Math.max(1, Math.floor(holder.clientWidth / spec.usermeta.columns));
  if (spec.usermeta?.moment) { // as many moments as fit, including the first and the last
    const last = Math.max(...spec.data.values.map(value => value.moment)), n = Math.max(2, Math.min(last, Math.floor((holder.clientWidth - 90) / spec.usermeta.moment)));
    const kept = new Set(Array.from({ length: n }, (_, at) => 1 + Math.round(at * (last - 1) / (n - 1))));
    spec.data.values = spec.data.values.filter(value => kept.has(value.moment));
  }
  for (const part of spec.vconcat ?? []) part.width = Math.max(160, Math.min(1180, holder.clientWidth - 62));
  if (spec.concat && holder.clientWidth >= 700) for (const part of spec.concat) part.width = Math.floor(Math.min(1100, holder.clientWidth - 130) / spec.columns) - 70;
  if (spec.concat && holder.clientWidth < 700) { spec.columns = 1; for (const part of spec.concat) part.width = Math.max(160, holder.clientWidth - 110); spec.config = { ...spec.config, legend: { ...spec.config?.legend, orient: "bottom" } }; }
  return spec;
}
const turns = new Map(); // of drawing each chart: the last call draws last
function draw(holder) { drawn.add(holder); const turn = (turns.get(holder) ?? Promise.resolve()).then(() => drawNow(holder)); turns.set(holder, turn); return turn; }
async function drawNow(holder) {
  const name = holder.dataset.chart;
  try {
    const [spec] = await Promise.all([json("chart-" + name), loadVega(), ready]);
    const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
    const font = "system-ui, sans-serif";
    const config = { background: null, font, view: { stroke: null }, axis: { labelColor: ink, titleColor: ink, gridColor: line, tickColor: line, domainColor: line, titleFontWeight: 500, labelOverlap: "greedy", labelSeparation: 6 }, legend: { labelColor: ink, titleColor: ink, labelFontSize: 11, layout: { top: { anchor: "start", direction: "vertical" } } }, header: { labelColor: ink, titleColor: ink, labelFontWeight: 600 }, title: { color: ink, fontWeight: 500 }, mark: { color: ink }, text: { color: ink } };
    const shown = adapted(spec, holder);
    if (shown.usermeta?.cells && !shown.data.values.some(value => value.cell)) { holder.textContent = "None of the selected cells has this metric."; return; }
    const { view } = await window.vegaEmbed(holder, shown, { config, renderer: spec.usermeta?.canvas ? "canvas" : "svg", actions: false });
    holder.style.minHeight = "0";
    if (!holder.hasAttribute("data-compare")) views.set(name, view);
  } catch (error) { holder.textContent = "This figure cannot be drawn: " + error.message; holder.classList.add("failed"); }
}
const watcher = new IntersectionObserver(entries => { for (const entry of entries) if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target); } }, { rootMargin: "300px" });
async function drawAll() { for (const holder of $$(".chart")) { await new Promise(resolve => (window.requestIdleCallback ?? setTimeout)(resolve)); if (!drawn.has(holder) && !holder.matches(".failed")) { watcher.unobserve(holder); await draw(holder); } } }
function columnsOf(values) { const names = [...new Set(values.flatMap(Object.keys))]; return [names, ...values.map(value => names.map(name => value[name]))]; }
$$("[data-save]").forEach(button => button.addEventListener("click", async () => {
  const name = button.dataset.ofChart, holder = $(`[data-chart="${name}"]:not([data-compare])`);
  if (!views.has(name)) await draw(holder);
  const kind = button.dataset.save, view = views.get(name);
  if (kind === "csv") {
    const spec = adapted(await json("chart-" + name), holder);
    const parts = spec.data ? [spec] : (spec.concat ?? spec.vconcat ?? [spec]).map(part => ({ data: part.data ?? part.layer[0].data }));
    save(`${pageName}-${name}.csv`, "text/csv", parts.map(part => csv(columnsOf(part.data.values))).join("\n"));
  } else if (kind === "svg") save(`${pageName}-${name}.svg`, "image/svg+xml", await view.toSVG());
  else save(`${pageName}-${name}.png`, "image/png", await view.toImageURL("png", 2));
}));
let width = innerWidth, resizing;
addEventListener("resize", () => { if (innerWidth === width) return; width = innerWidth; clearTimeout(resizing); resizing = setTimeout(() => drawn.forEach(holder => draw(holder)), 200); });
theme.addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
dark.addEventListener("change", () => setTheme(dark.matches));
nameTheme(dark.matches);
