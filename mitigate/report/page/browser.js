"use strict";
// The filters of the sample browser. The samples are in the page already; this only hides and shows them, and keeps
// the state in the address (#show=fixed&stack=NAME), so that a view can be shared.
(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const count = document.getElementById("count");
  const link = document.querySelector('nav a[href="#samples"]');
  const samples = facts.samples.map((fact, index) => {
    const element = document.getElementById(`sample-${index}`);
    return { fact, element, sheet: element.closest(".sheet"), text: null };
  });
  const sheets = new Set(samples.map((sample) => sample.sheet));
  const NAMES = ["show", "stack", "task", "category", "q"];

  const searched = (sample) => {
    if (sample.text === null) sample.text = sample.element.textContent.toLowerCase();
    return sample.text;
  };

  const state = () => {
    const found = Object.fromEntries(new FormData(form));
    return Object.fromEntries(NAMES.map((name) => [name, found[name] || ""]));
  };

  const matches = (sample, wanted) => {
    const { states, task, categories } = sample.fact;
    const own = wanted.stack ? states[wanted.stack] || [] : Object.values(states).flat();
    return (
      (wanted.show === "all" || own.includes(wanted.show)) &&
      (!wanted.task || task === wanted.task) &&
      (!wanted.category || categories.includes(wanted.category)) &&
      (!wanted.q || searched(sample).includes(wanted.q.toLowerCase()))
    );
  };

  // With one stack chosen, its answers stand beside the baseline's alone.
  const showAnswers = (chosen) => {
    for (const giver of form.parentElement.querySelectorAll(".giver")) {
      const stack = giver.dataset.stack;
      giver.hidden = Boolean(chosen) && stack !== chosen && stack !== facts.baseline;
    }
    for (const reply of form.parentElement.querySelectorAll(".reply")) {
      reply.hidden = !reply.querySelector(".giver:not([hidden])");
    }
  };

  let shownStack = "";
  const apply = () => {
    const wanted = state();
    const open = new Set();
    let visible = 0;
    for (const sample of samples) {
      const shown = matches(sample, wanted);
      sample.element.hidden = !shown;
      if (shown) {
        visible += 1;
        open.add(sample.sheet);
      }
    }
    for (const sheet of sheets) sheet.hidden = !open.has(sheet);
    if (wanted.stack !== shownStack) showAnswers((shownStack = wanted.stack));
    link.textContent = visible < samples.length ? `Samples (${visible} match)` : "Samples";
    count.textContent = visible
      ? `${visible} of the ${samples.length} samples on this page match.`
      : "No sample on this page matches; clear a filter.";
  };

  const remember = () => {
    const wanted = state();
    const kept = new URLSearchParams(NAMES.filter((name) => wanted[name]).map((name) => [name, wanted[name]]));
    const hash = `#${kept}`;
    if (hash !== location.hash) location.replace(hash); // no new entry in the history per letter typed
  };

  // A value that no option has (an old link, a typing error) falls back to "any".
  const restore = () => {
    if (!location.hash.includes("=")) return; // a link to a section
    const kept = new URLSearchParams(location.hash.slice(1));
    const radios = [...form.elements].filter((item) => item.name === "show");
    const show = radios.find((radio) => radio.value === kept.get("show")) || radios[0];
    show.checked = true;
    for (const select of form.querySelectorAll("select")) {
      const value = kept.get(select.name) || "";
      select.value = [...select.options].some((option) => option.value === value) ? value : "";
    }
    form.elements.q.value = kept.get("q") || "";
  };

  let waiting = 0;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      apply();
      remember();
    }, 80);
  });
  form.addEventListener("reset", () => setTimeout(() => {
    apply();
    remember();
  }));
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", () => {
    restore();
    apply();
  });

  form.hidden = false;
  restore();
  apply();
})();
