const adaptedToPage = spec => spec;
json("page").then(facts => {
  if (facts.latents.length) startLatents(facts.latents, facts.colors);
  drawAll().then(fillLatents);
  document.documentElement.dataset.ready = "";
});
