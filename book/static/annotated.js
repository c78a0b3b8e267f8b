// The book's own script: formulas, printing, and search from a folder on a disk. Nothing is fetched from another host.
(() => {
  const mathjax = new URL("vendor/mathjax/tex-svg.js", document.currentScript.src);

  // MathJax is 2 MB. It is fetched when the first formula comes near the window; what is further away follows in pauses,
  // once the reader has begun to move, so that formulas are there before they are reached.
  const waiting = new Set(document.querySelectorAll("span.math, div.math"));
  let engine = null;
  let queue = Promise.resolve();

  function start() {
    engine ??= new Promise((ready, failed) => {
      const configuration = window.MathJax || {};
      window.MathJax = { ...configuration, startup: { ...configuration.startup, typeset: false } };
      const script = document.createElement("script");
      script.src = mathjax;
      script.onload = () => window.MathJax.startup.promise.then(ready);
      script.onerror = failed;
      document.head.append(script);
    });
    return engine;
  }

  // What scrolls inside itself can be reached, and moved, with the keyboard.
  function reach(boxes) {
    [...boxes].filter((box) => box.scrollWidth > box.clientWidth + 1).forEach((box) => (box.tabIndex = 0));
  }

  function typeset(formulas) {
    const now = formulas.filter((formula) => waiting.delete(formula));
    if (now.length) {
      queue = queue.then(start).then(() => window.MathJax.typesetPromise(now));
      queue = queue.then(() => reach(now.flatMap((formula) => [...formula.querySelectorAll("mjx-container")])));
    }
    return queue;
  }

  const pause = window.requestIdleCallback || ((work) => setTimeout(work, 60));
  const rest = () => waiting.size && pause(() => typeset([...waiting].slice(0, 6)).then(rest));
  let moved = false;
  function begin() {
    if (!moved) rest();
    moved = true;
  }

  const near = new IntersectionObserver(
    (entries) => typeset(entries.filter((entry) => entry.isIntersecting).map((entry) => entry.target)),
    { rootMargin: "800px 0px" },
  );
  waiting.forEach((formula) => near.observe(formula));
  ["scroll", "pointermove", "keydown", "touchstart"].forEach((kind) => addEventListener(kind, begin, { once: true, passive: true }));

  // On paper nothing can be unfolded, and the ground is white. The book's PDF and its tests use these, too.
  const unfold = () => document.querySelectorAll("details").forEach((fold) => (fold.open = true));
  window.annotated = {
    unfold,
    ready: () => typeset([...waiting]),
  };
  const root = document.documentElement;
  let theme = root.dataset.theme;
  addEventListener("beforeprint", () => {
    theme = root.dataset.theme;
    root.dataset.theme = "light";
    unfold();
    typeset([...waiting]);
  });
  addEventListener("afterprint", () => (root.dataset.theme = theme));

  // A page from a disk may not read the other pages, from which a search shows the lines around its findings.
  if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
    DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
  }

  addEventListener("load", () => reach(document.querySelectorAll(".bd-article pre, .table-scroll, .output.text_html")));
})();
