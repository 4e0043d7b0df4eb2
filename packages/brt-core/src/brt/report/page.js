(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // Theme: the system's until the button is used
  const dark = () => root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  const theme = document.getElementById("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; });

  // Details of what is pointed at; the browser's own tooltips are for pages without scripts
  const tip = document.getElementById("tip");
  for (const title of document.querySelectorAll("[data-tip] > title")) title.remove();
  const show = (target, x, y) => {
    tip.textContent = target.dataset.tip;
    const width = tip.offsetWidth, height = tip.offsetHeight;
    tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - width - 8)) + "px";
    tip.style.top = (y + 18 + height > innerHeight ? Math.max(8, y - height - 12) : y + 18) + "px";
    tip.style.visibility = "visible";
  };
  const near = (target) => {
    const graph = target.closest(".graph");
    if (!graph) return;
    graph.classList.add("points");
    for (const edge of graph.querySelectorAll(".edge")) {
      const of = edge.dataset.from === target.dataset.name || edge.dataset.to === target.dataset.name;
      edge.classList.toggle("near", of);
    }
  };
  const leave = (target) => {
    tip.style.visibility = "hidden";
    const graph = target.closest(".graph");
    if (graph) graph.classList.remove("points");
  };
  for (const target of document.querySelectorAll("[data-tip]")) {
    target.addEventListener("pointermove", (event) => show(target, event.clientX, event.clientY));
    target.addEventListener("pointerenter", () => near(target));
    target.addEventListener("pointerleave", () => leave(target));
    target.addEventListener("focus", () => {
      if (!target.matches(":focus-visible")) return;
      const at = target.getBoundingClientRect();
      near(target);
      show(target, at.left + at.width / 2, at.bottom - 12);
    });
    target.addEventListener("blur", () => leave(target));
  }

  // Graphs too wide to stand side by side: one at a time
  for (const views of document.querySelectorAll(".views")) {
    const figures = [...document.getElementById(views.dataset.of).querySelectorAll("figure")];
    const buttons = [...views.querySelectorAll("button")];
    const choose = (wanted) => {
      for (const button of buttons) button.setAttribute("aria-pressed", button === wanted);
      for (const figure of figures) {
        figure.hidden = wanted.value !== "both" && figure.dataset.when !== wanted.value;
      }
    };
    for (const button of buttons) button.addEventListener("click", () => choose(button));
    choose(buttons.find((button) => button.value === "after") || buttons[0]);
  }

  // On paper everything is open
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
