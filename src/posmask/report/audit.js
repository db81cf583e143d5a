const adaptedToPage = spec => spec;
json("page").then(facts => {
  if (facts.latents.length) startLatents(facts.latents, facts.colors);
  drawAll();
  document.documentElement.dataset.ready = "";
});
