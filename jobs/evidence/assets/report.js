"use strict";
// Draws the charts from the data in the page, shows a token's numbers where it is pointed at, and
// lets the keyboard reach a table that scrolls.
(() => {
  const page = JSON.parse(document.getElementById("page").textContent);
  const tooltip = { theme: matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light" };
  const drawn = [...document.querySelectorAll("[data-chart]")].map((element) => {
    const spec = page.charts[element.dataset.chart];
    spec.datasets = page.data;
    return vegaEmbed(element, spec, { actions: false, renderer: page.renderer, tooltip });
  });
  Promise.all(drawn).then(() => { document.documentElement.dataset.ready = "true"; });

  const scrolling = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const isWider = target.scrollWidth > target.clientWidth;
      for (const [name, value] of [["tabindex", "0"], ["role", "group"], ["aria-label", "Table that scrolls sideways"]]) {
        if (isWider) target.setAttribute(name, value);
        else target.removeAttribute(name);
      }
    }
  });
  for (const element of document.querySelectorAll(".scroll")) scrolling.observe(element);

  const tip = document.getElementById("tip");
  let at = null;

  function show(token) {
    hide();
    at = token;
    at.classList.add("at");
    const { i, r, s } = token.dataset;
    const probability = Math.exp(-s);
    const percent = probability >= 0.0001 ? `${(100 * probability).toPrecision(3)} %` : "under 0.01 %";
    // textContent, never innerHTML: the token is somebody else's text.
    tip.textContent = `${JSON.stringify(token.textContent.replaceAll("↵", ""))}, id ${i}\n` +
      `rank ${Number(r).toLocaleString("en")}\nsurprisal ${s} nats (${percent})`;
    tip.hidden = false;
    const box = token.getClientRects()[0] || token.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(8, left) + window.scrollX}px`;
    tip.style.top = `${(above > 0 ? above : box.bottom + 10) + window.scrollY}px`;
  }

  function hide() {
    if (at) at.classList.remove("at");
    at = null;
    tip.hidden = true;
  }

  for (const view of document.querySelectorAll(".example .tokens")) {
    const tokenOf = (event) => event.target.closest("span[data-i]");
    view.addEventListener("mouseover", (event) => { if (tokenOf(event)) show(tokenOf(event)); });
    view.addEventListener("mouseleave", hide);
    view.addEventListener("click", (event) => { if (tokenOf(event)) show(tokenOf(event)); });
    view.addEventListener("blur", hide);
    view.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hide();
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const tokens = [...view.children];
      const next = tokens[at ? tokens.indexOf(at) + step : 0];
      if (next) { next.scrollIntoView({ block: "nearest" }); show(next); }
    });
  }

  // What is folded away on a screen belongs on paper.
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
