"use strict";
(() => {
  const root = document.documentElement, body = document.body;
  const byId = (id) => document.getElementById(id);
  const fps = Number(body.dataset.fps), frames = Number(body.dataset.frames), length = frames / fps;
  const cards = [...document.querySelectorAll(".card")];
  const play = byId("play"), scrub = byId("scrub"), loop = byId("loop"), speed = byId("speed"), where = byId("where");
  const search = byId("search"), found = byId("found"), compare = byId("compare"), help = byId("help"), wipe = byId("wipe");
  const sides = [byId("sideA"), byId("sideB")];
  const filters = [...document.querySelectorAll("select[data-filter]")];
  const models = [...document.querySelectorAll("input[data-model]")];
  const moved = new WeakMap();  /* when a stray video was last put right */
  const live = new Set();       /* the video elements there are */
  let playing = false, clock = 0, last = 0;

  /* ---- videos: an element exists only while its place is near the screen ---- */
  const address = (number) => {
    const text = byId("video" + number);
    return text === null ? "videos/" + String(number).padStart(5, "0") + ".mp4" : "data:video/mp4;base64," + text.textContent;
  };
  const attach = (frame, number, name) => {
    const video = document.createElement("video");
    video.muted = true;
    video.playsInline = true;
    video.preload = "auto";
    video.setAttribute("aria-label", name);
    video.addEventListener("error", () => { frame.dataset.state = "broken"; live.delete(video); video.remove(); });
    video.addEventListener("loadedmetadata", () => {
      frame.style.setProperty("--shape", video.videoWidth + " / " + video.videoHeight);
      frame.classList.toggle("small", video.videoWidth < 200);
      (playing ? start : hold)(video);
    });
    video.src = address(number);
    frame.append(video);
    live.add(video);
    return video;
  };
  const detach = (video) => {
    live.delete(video);
    video.pause();
    video.removeAttribute("src");
    video.load();
    video.remove();
  };
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const frame = entry.target, video = frame.querySelector("video");
      if (entry.isIntersecting && video === null && frame.dataset.state === undefined) {
        attach(frame, frame.dataset.video, frame.dataset.name);
      } else if (!entry.isIntersecting && video !== null) {
        detach(video);
      }
    }
  }, { rootMargin: "200px" });
  document.querySelectorAll(".card .frame[data-video]").forEach((frame) => watcher.observe(frame));

  /* ---- one clock for all ---- */
  const rate = () => Number(speed.value);
  const target = (video) => {
    const end = Number.isFinite(video.duration) ? video.duration : length;
    return Math.max(0, Math.min(clock, end - 0.5 / fps));
  };
  const show = () => {
    const frame = Math.min(frames - 1, Math.floor(clock * fps + 1e-6));
    scrub.value = String(frame);
    where.textContent = "frame " + (frame + 1) + " of " + frames;
    scrub.setAttribute("aria-valuetext", where.textContent);
    body.dataset.playing = String(playing);
  };
  const seek = (video) => { video.currentTime = Math.min(target(video) + 0.25 / fps, length); };
  function start(video) {
    video.playbackRate = rate();
    if (Math.abs(video.currentTime - target(video)) > 1 / fps) { seek(video); }
    if (video.paused && !video.ended) { video.play().catch(() => undefined); }
  }
  function hold(video) { video.pause(); seek(video); }
  const align = () => live.forEach(playing ? start : hold);

  /* While videos play, the clock is their median: a slow machine slows all of them alike, and only strays are moved. */
  const advance = (now) => {
    const sound = [...live].filter((video) => !video.error);
    const running = sound.filter((video) => video.readyState >= 2 && !video.seeking && !video.ended);
    if (sound.length === 0) {
      clock += Math.max(0, now - last) / 1000 * rate();
    } else if (running.length > 0) {
      clock = running.map((video) => video.currentTime).sort((a, b) => a - b)[running.length >> 1];
    } else if (sound.every((video) => video.ended)) {
      clock = length;
    }
    last = now;
    for (const video of running) {
      const stray = Math.abs(video.currentTime - target(video)) > 4 / fps;
      if (stray && now - (moved.get(video) || 0) > 1000) { moved.set(video, now); seek(video); }
      if (video.paused) { start(video); }
    }
  };
  const tick = (now) => {
    if (!playing) { return; }
    advance(now);
    if (clock >= length - 0.25 / fps) {
      if (!loop.checked) { clock = length - 0.5 / fps; stop(); return; }
      clock = 0;
      live.forEach((video) => { video.currentTime = 0; });
      align();
    }
    show();
    requestAnimationFrame(tick);
  };
  const go = () => {
    if (clock >= length - 1 / fps) { clock = 0; }
    playing = true;
    play.textContent = "Pause";
    last = performance.now();
    align();
    show();
    requestAnimationFrame(tick);
  };
  const stop = () => { playing = false; play.textContent = "Play"; align(); show(); };
  const toggle = () => (playing ? stop() : go());
  const step = (count) => {
    stop();
    clock = ((Math.floor(clock * fps + 1e-6) + count + frames) % frames) / fps;
    align();
    show();
  };

  /* ---- which prompts and models are shown ---- */
  const texts = cards.map((card) => card.querySelector("h3").textContent.toLowerCase());
  const choose = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter((word) => word !== "");
    let count = 0;
    cards.forEach((card, place) => {
      const tagged = filters.every((filter) => filter.value === "" || card.dataset["tag" + filter.dataset.filter] === filter.value);
      card.hidden = !(tagged && words.every((word) => texts[place].includes(word)));
      count += card.hidden ? 0 : 1;
    });
    found.textContent = count + " of " + cards.length + " prompts";
  };
  const chooseModels = () => {
    for (const box of models) {
      document.querySelectorAll("figure[data-model='" + box.dataset.model + "']").forEach((figure) => { figure.hidden = !box.checked; });
    }
  };
  const current = () => {
    const own = document.activeElement === null ? null : document.activeElement.closest(".card");
    const seen = (card) => !card.hidden && card.getBoundingClientRect().bottom > 80;
    return own !== null && !own.hidden ? own : cards.find(seen);
  };
  const goTo = (count) => {
    const shown = cards.filter((card) => !card.hidden), at = shown.indexOf(current());
    const next = shown[Math.max(0, Math.min(shown.length - 1, document.activeElement.closest(".card") ? at + count : at))];
    if (next !== undefined) { next.focus({ preventScroll: true }); next.scrollIntoView({ block: "center" }); }
  };

  /* ---- A/B ---- */
  const choices = () => sides.map((side) => side.value);
  const fill = () => {
    wipe.querySelectorAll("video").forEach(detach);
    choices().forEach((number, place) => {
      const video = attach(wipe, number, sides[place].selectedOptions[0].textContent);
      video.classList.toggle("top", place === 1);
      wipe.querySelector(place === 0 ? ".a" : ".b").textContent = sides[place].selectedOptions[0].textContent;
    });
    delete wipe.dataset.state;
  };
  const open = (card) => {
    const places = [...card.querySelectorAll(".frame[data-video]")].filter((frame) => !frame.parentElement.hidden);
    if (places.length < 2) { return; }
    byId("compared").textContent = card.querySelector("h3").textContent;
    sides.forEach((side, which) => {
      side.replaceChildren(...places.map((frame, place) => {
        const option = new Option(frame.dataset.name, frame.dataset.video);
        option.selected = place === which;
        return option;
      }));
    });
    compare.showModal();
    fill();
  };
  const cut = (share) => {
    const value = Math.max(0, Math.min(100, share));
    byId("wiper").value = String(value);
    wipe.style.setProperty("--wipe", value + "%");
  };
  const drag = (event) => {
    const box = wipe.getBoundingClientRect();
    if (event.buttons & 1) { cut((event.clientX - box.left) / box.width * 100); }
  };

  /* ---- copying, theme, keys ---- */
  const copy = async (button) => {
    const text = button.closest(".card").querySelector("h3").textContent;
    let done = false;
    try { await navigator.clipboard.writeText(text); done = true; } catch (error) {
      const area = document.createElement("textarea");
      area.value = text;
      body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
    }
    button.textContent = done ? "Copied" : "Select and copy it";
    setTimeout(() => { button.textContent = "Copy prompt"; }, 1500);
  };
  const dark = () => root.dataset.theme === "dark" || (root.dataset.theme === undefined && matchMedia("(prefers-color-scheme: dark)").matches);
  const theme = () => { root.dataset.theme = dark() ? "light" : "dark"; };
  const keys = {
    " ": toggle, ArrowRight: () => step(1), ArrowLeft: () => step(-1), l: () => { loop.checked = !loop.checked; },
    "/": () => search.focus(), j: () => goTo(1), k: () => goTo(-1), t: theme, "?": () => help.showModal(),
    c: () => { const card = current(); if (card !== undefined) { open(card); } },
  };
  document.addEventListener("keydown", (event) => {
    if (event.target === search && event.key === "Escape") { search.value = ""; choose(); search.blur(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey) { return; }
    if (event.target.closest("select, input:not([type=checkbox])")) { return; }
    if (event.key === " " && event.target.closest("input, button, summary")) { return; }
    if ((compare.open || help.open) && ![" ", "ArrowRight", "ArrowLeft", "l"].includes(event.key)) { return; }
    const act = keys[event.key];
    if (act !== undefined) { event.preventDefault(); act(); }
  });

  play.addEventListener("click", toggle);
  scrub.addEventListener("input", () => { const frame = Number(scrub.value); stop(); clock = frame / fps; align(); show(); });
  speed.addEventListener("change", () => live.forEach((video) => { video.playbackRate = rate(); }));
  search.addEventListener("input", choose);
  filters.forEach((filter) => filter.addEventListener("change", choose));
  models.forEach((box) => box.addEventListener("change", chooseModels));
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.copy, button.compare");
    if (button !== null) { button.classList.contains("copy") ? copy(button) : open(button.closest(".card")); }
  });
  sides.forEach((side) => side.addEventListener("change", fill));
  byId("swap").addEventListener("click", () => { const [a, b] = choices(); sides[0].value = b; sides[1].value = a; fill(); });
  byId("done").addEventListener("click", () => compare.close());
  compare.addEventListener("close", () => wipe.querySelectorAll("video").forEach(detach));
  byId("wiper").addEventListener("input", () => cut(Number(byId("wiper").value)));
  wipe.addEventListener("pointerdown", drag);
  wipe.addEventListener("pointermove", drag);
  byId("theme").addEventListener("click", theme);
  byId("keys").addEventListener("click", () => help.showModal());
  byId("helpdone").addEventListener("click", () => help.close());
  choose();
  show();
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) { go(); }
  body.dataset.ready = "true";
})();
