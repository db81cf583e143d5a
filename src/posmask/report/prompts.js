// A text that a reader types, and the latents that fire on it. `posmask serve` adds this to a page that it serves.
const N_LISTED = 12;
class Prompt {
  constructor(app) {
    Object.assign(this, { app, found: null, mask: "on", latent: null, at: null, most: N_LISTED, turn: 0 });
    this.text = make("textarea", { id: "prompt-text", rows: 2, placeholder: "Type a text: which latents fire where?", "aria-describedby": "prompt-keys" });
    this.send = make("button", { type: "submit" }, "Encode");
    this.form = make("form", { class: "prompt-form" }, make("label", { for: "prompt-text" }, "Your text"), make("span", { id: "prompt-keys", class: "note" }, "Ctrl+Enter encodes it"), this.text, this.send);
    this.result = make("section", { class: "prompt", "aria-label": "Latents in your text", hidden: "" });
    this.browse = app.choice.closest(".browse");
    app.choice.closest(".bar").after(this.form, this.result);
    this.form.addEventListener("submit", event => { event.preventDefault(); this.ask(); });
    this.text.addEventListener("keydown", event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); this.ask(); } });
    app.holder.addEventListener("cell", () => { if (!this.result.hidden) this.ask(); });
  }
  async ask() { // of the cell that is selected
    const { folder, identity, label } = this.app.cells[Number(this.app.choice.value)], text = this.text.value, turn = ++this.turn;
    const n = [...text].length;
    this.say(`Encoding with ${label} … `, "The first text takes longer, because the model and the SAE are read.");
    const found = n > MOST_CHARACTERS ? { error: `the text has ${n.toLocaleString("en")} characters: give at most ${MOST_CHARACTERS.toLocaleString("en")}` } : await this.codes({ folder, identity, text });
    if (turn !== this.turn) return; // another text or cell was chosen meanwhile
    if (found.error) { this.say(...found.error.split("`").map((part, n) => n % 2 ? make("code", {}, part) : part)); return; }
    Object.assign(this, { found, label, latent: null, at: null, most: N_LISTED });
    if (!found.masks[this.mask]) this.mask = "on";
    this.render();
  }
  async codes(asked) {
    try {
      const answer = await fetch("prompts", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked) });
      return answer.ok ? await answer.json() : { error: `the server refused the text (${answer.status} ${answer.statusText})` };
    } catch { return { error: "the server does not answer: start `posmask serve` again" }; }
  }
  open() { this.result.hidden = false; this.browse.classList.add("prompting"); }
  close() {
    this.turn++; this.result.hidden = true; this.browse.classList.remove("prompting");
    const { app } = this; if (app.block) { app.paint(); app.drawMap(); app.drawBrush(); }
    this.text.focus();
  }
  back() { return make("button", { type: "button", class: "back", onclick: () => this.close() }, "Back to the list"); }
  say(...parts) { const line = make("p", {}, ...parts); this.open(); this.result.replaceChildren(this.back(), line); announce(line.textContent); }

  // What was found.
  render() {
    const { words, position, left_out: leftOut, masks } = this.found, n = words.length;
    this.codesOf = new Map(); // activations by token of each latent
    const { token, latent, value } = masks[this.mask];
    latent.forEach((number, code) => { if (!this.codesOf.has(number)) this.codesOf.set(number, new Map()); this.codesOf.get(number).set(token[code], value[code]); });
    const choice = make("select", { "aria-label": "Mask", onchange: event => { this.mask = event.target.value; this.render(); $("select", this.result).focus(); } }, make("option", { value: "on" }, "mask on"), make("option", { value: "lifted" }, LIFTED));
    choice.value = this.mask;
    const cut = leftOut ? ` The ${leftOut.toLocaleString("en")} tokens after them are left out: contexts end there.` : "";
    this.tokens = make("div", { class: "typed", role: "group", "aria-label": "Tokens", "data-strip": "" });
    words.forEach((word, t) => this.tokens.append(make("button", { type: "button", "data-tip": this.told(t), "aria-pressed": false, class: this.found.state[t] === "encoded" ? null : "left", onclick: () => this.choose(t) }, word.trim() ? word : spaced(word)), ...(word.includes("↵") ? [make("br")] : [])));
    this.listed = make("div", { class: "found" });
    this.result.replaceChildren(
      make("div", { class: "bar" }, masks.lifted ? choice : null, this.back()),
      make("p", { class: "note" }, `${this.label}: ${n.toLocaleString("en")} token${n === 1 ? "" : "s"} at position${n === 1 ? "" : "s"} ${span(position[0], position[n - 1])} after BOS.${cut}`),
      this.tokens, this.listed);
    this.open(); this.list(); this.shade();
    announce(`${n} tokens, ${this.codesOf.size} latents`);
  }
  strongest(t = this.at) { // [latent, token, activation] at a token, or at each latent's strongest one
    const peak = codes => [...codes].reduce((best, code) => code[1] > best[1] ? code : best);
    const found = t === null ? [...this.codesOf].map(([latent, codes]) => [latent, ...peak(codes)]) : [...this.codesOf].filter(([, codes]) => codes.has(t)).map(([latent, codes]) => [latent, t, codes.get(t)]);
    return found.sort((a, b) => b[2] - a[2] || a[0] - b[0]);
  }
  told(t) {
    const { words, position, state, masks } = this.found, where = `${spaced(words[t])}, position ${position[t]}: `;
    if (state[t] !== "encoded") return where + (state[t] === "sink" ? "an attention sink, not encoded" : "a special token, not encoded");
    return where + `${masks[this.mask].active[t]} latents fire; ` + this.strongest(t).slice(0, 3).map(([latent, , value]) => `${latent} (${activation(value)})`).join(", ");
  }
  choose(t) { // a token, or none if it was chosen
    this.at = this.at === t ? null : t; this.most = N_LISTED;
    this.list(); this.shade();
  }
  list() {
    const { words, position } = this.found, found = this.strongest(), n = words.length, shown = found.slice(0, this.most);
    const title = this.at === null ? "Strongest in the text" : `Strongest at ${spaced(words[this.at])}, position ${position[this.at]}`;
    const line = ([latent, t, value]) => make("tr", { "data-latent": latent },
      make("td", {}, this.button(latent)),
      make("td", {}, activation(value)), make("td", { class: "text" }, make("small", {}, `@${position[t]}`), make("bdi", {}, spaced(words[t]))), make("td", {}, this.bars(latent)));
    this.listed.replaceChildren(
      make("h4", {}, title, this.at === null ? null : make("button", { type: "button", onclick: () => { this.choose(this.at); $("button", this.tokens).focus(); } }, "whole text")),
      found.length ? make("table", { "data-strip": "", "data-rows": "" }, make("thead", {}, make("tr", {}, ...["latent", "activation", "at", `position ${span(position[0], position[n - 1])}`].map((head, at) => make("th", { scope: "col", class: at > 1 ? "text" : null }, head)))), make("tbody", {}, ...shown.map(line))) : make("p", { class: "note" }, "No latent fires."),
      found.length > shown.length ? make("button", { type: "button", onclick: () => { this.most += 20; this.list(); this.shade(); } }, `Show ${Math.min(20, found.length - shown.length)} more`) : "");
  }
  button(latent) {
    const at = this.app.rowOf?.get(latent), color = at === undefined ? "transparent" : CLASS_COLORS[this.app.classOf(at)] ?? "var(--bar)";
    return make("button", { type: "button", "aria-label": `Latent ${latent}${at === undefined ? ", not on this page" : ""}`, class: at === undefined ? "absent" : null, onclick: () => this.pick(latent) }, make("i", { class: "dot", style: `background:${color}` }), String(latent));
  }
  bars(latent) { // its activations along the text
    const { words, position } = this.found, n = words.length, codes = this.codesOf.get(latent), most = Math.max(...codes.values()), wide = Math.max(1, n / 80);
    const svg = SVG("svg", { class: "along", viewBox: `0 0 ${n} 20`, preserveAspectRatio: "none", role: "group", "aria-label": `Activations of latent ${latent} by position` }, SVG("rect", { class: "ground", width: n, height: 20 }));
    if (this.at !== null) svg.append(SVG("rect", { class: "here", x: this.at + 0.5 - wide / 2, width: wide, height: 20 }));
    for (const [t, value] of [...codes].sort(([a], [b]) => a - b)) {
      const height = 2 + 18 * value / most;
      svg.append(SVG("rect", { class: "code", x: Math.max(0, Math.min(n - wide, t + 0.5 - wide / 2)), width: wide, y: 20 - height, height, "data-tip": `${spaced(words[t])}, position ${position[t]}: ${activation(value)}` }));
    }
    return svg;
  }
  shade() { // tokens by the activation of the picked latent, or by their strongest one
    const codes = this.latent === null ? null : this.codesOf.get(this.latent) ?? new Map(), strongest = new Map();
    if (!codes) for (const of of this.codesOf.values()) for (const [t, value] of of) strongest.set(t, Math.max(value, strongest.get(t) ?? 0));
    const values = codes ?? strongest, most = Math.max(...values.values());
    $$("button", this.tokens).forEach((button, t) => {
      button.setAttribute("aria-pressed", t === this.at);
      button.style.setProperty("--a", values.has(t) ? Math.round(12 + 78 * values.get(t) / most) + "%" : "0%");
    });
    for (const line of $$("tr[data-latent]", this.listed)) line.setAttribute("aria-selected", Number(line.dataset.latent) === this.latent);
  }
  async pick(latent) { // shade the text by a latent and show it beside
    const { app } = this;
    this.latent = latent; this.shade();
    await app.go({ ...app.cellState(Number(app.choice.value)), latent, p: app.range }, "push");
    if (app.detail.getBoundingClientRect().top > innerHeight - 80) app.detail.scrollIntoView();
  }
}
function startPrompts() { if (latentApp) new Prompt(latentApp); }
if ("ready" in document.documentElement.dataset) startPrompts();
else new MutationObserver((_, observer) => { observer.disconnect(); startPrompts(); }).observe(document.documentElement, { attributeFilter: ["data-ready"] });
