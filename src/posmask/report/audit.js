const adaptedToPage = spec => spec;
// All charts are drawn at once, so that none is blank in print.
(async () => { for (const holder of $$(".chart")) await draw(holder); })();
document.documentElement.dataset.ready = "";
