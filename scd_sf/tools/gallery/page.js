"use strict";
(() => {
  const root = document.documentElement, body = document.body;
  const byId = (id) => document.getElementById(id);
  const fps = Number(body.dataset.fps), frames = Number(body.dataset.frames), length = frames / fps;
  const cards = [...document.querySelectorAll(".card")];
  const play = byId("play"), scrub = byId("scrub"), loop = byId("loop"), speed = byId("speed"), where = byId("where");
  const search = byId("search"), found = byId("found"), size = byId("size"), sample = byId("sample");
  const compare = byId("compare"), wipe = byId("wipe"), wiper = byId("wiper"), wiped = wipe.parentElement;
  const bar = byId("bar"), help = byId("help");
  const sides = [byId("sideA"), byId("sideB")];
  const filters = [...document.querySelectorAll("select[data-filter]")];
  const models = [...document.querySelectorAll("input[data-model]")];
  const moved = new WeakMap();  /* when a stray video was last put right */
  const live = new Set();       /* the video elements in use */
  const spare = [];             /* those that wait for another place: browsers let go of dropped ones late */
  const near = new Set();       /* the places near the screen */
  let playing = false, clock = 0, last = 0, resting = 0;

  /* ---- videos: an element exists only while its place is near the screen ---- */
  /* Of one file's videos those that the parser has passed are whole; null: not read yet. */
  const address = (name) => {
    if (body.dataset.single === undefined) { return "videos/" + name + ".mp4"; }
    const text = byId("video-" + name);
    if (text === null || (text.nextSibling === null && document.readyState === "loading")) { return null; }
    const signs = atob(text.textContent), bytes = new Uint8Array(signs.length);
    for (let i = 0; i < signs.length; i += 1) { bytes[i] = signs.charCodeAt(i); }
    return URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  };
  const mark = (frame, words) => {
    const text = document.createElement("p");
    text.className = "mark";
    text.textContent = words;
    frame.append(text);
    frame.dataset.state = "broken";
  };
  const fresh = () => {
    const video = document.createElement("video");
    video.muted = true;
    video.playsInline = true;
    video.preload = "auto";
    video.addEventListener("error", () => {
      if (!live.has(video)) { return; }
      const frame = video.parentElement;
      detach(video);
      mark(frame, "video cannot be played");
    });
    video.addEventListener("loadedmetadata", () => {
      if (!live.has(video)) { return; }
      const frame = video.parentElement;
      frame.style.setProperty("--shape", video.videoWidth + " / " + video.videoHeight);
      if (frame === wipe) { wiped.style.setProperty("--ratio", String(video.videoWidth / video.videoHeight)); }
      frame.classList.toggle("small", video.videoWidth < 200);
      (playing ? start : hold)(video);
    });
    return video;
  };
  const attach = (frame, name, label) => {
    const source = address(name);
    if (source === null) { return null; }
    const video = spare.pop() || fresh();
    video.className = "";
    video.setAttribute("aria-label", label);
    video.src = source;
    frame.append(video);
    live.add(video);
    return video;
  };
  const detach = (video) => {
    const source = video.src;
    live.delete(video);
    video.pause();
    video.removeAttribute("src");
    video.load();
    video.remove();
    spare.push(video);
    if (source.startsWith("blob:")) { URL.revokeObjectURL(source); }
  };
  const settle = (frame) => {
    const video = frame.querySelector("video");
    if (near.has(frame) && video === null && frame.dataset.state === undefined) {
      attach(frame, frame.dataset.video, frame.dataset.name);
    } else if (!near.has(frame) && video !== null) {
      detach(video);
    }
  };
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) { near.add(entry.target); } else { near.delete(entry.target); }
      settle(entry.target);
    }
  }, { rootMargin: "200px" });
  document.querySelectorAll(".card .frame[data-video]").forEach((frame) => watcher.observe(frame));
  const reading = setInterval(() => {
    near.forEach(settle);
    if (document.readyState !== "loading") { clearInterval(reading); }
  }, 100);

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
  const seek = (video, within = 0.25) => { video.currentTime = Math.min(target(video) + within / fps, length); };
  function start(video) {
    video.playbackRate = rate();
    if (Math.abs(video.currentTime - target(video)) > 1 / fps) { seek(video); }
    if (video.paused && !video.ended) { video.play().catch(() => undefined); }
  }
  function hold(video) {
    video.pause();
    seek(video);
    clearTimeout(resting);
    resting = setTimeout(again, 250);
  }
  /* Chromium now and then does not paint what it sought: all once more when the slider rests, elsewhere in the frame. */
  const again = () => { if (!playing) { live.forEach((video) => seek(video, 0.35)); } };
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
  const goToFrame = (frame) => {
    clock = frame / fps;
    stop();
  };
  const step = (count) => goToFrame((Math.floor(clock * fps + 1e-6) + count + frames) % frames);

  /* ---- which prompts and models are shown ---- */
  const texts = cards.map((card) => {
    const parts = [...card.querySelectorAll("h3, .words bdi")];
    return parts.map((part) => part.textContent.toLowerCase()).join("\n");
  });
  const tag = (card, filter) => card.dataset["tag" + filter.dataset.filter];
  const fits = (card) => filters.every((filter) => filter.value === "" || tag(card, filter) === filter.value);
  const choose = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter((word) => word !== "");
    let count = 0;
    cards.forEach((card, place) => {
      card.hidden = !(fits(card) && words.every((word) => texts[place].includes(word)));
      count += card.hidden ? 0 : 1;
    });
    found.textContent = count + " of " + cards.length + " prompts";
    byId("none").hidden = count > 0;
  };
  const chooseFigures = () => {
    const shown = new Set(models.filter((box) => box.checked).map((box) => box.dataset.model));
    const number = sample === null ? "" : sample.value;
    for (const videos of document.querySelectorAll(".videos")) {
      const figures = [...videos.children];
      for (const figure of figures) {
        figure.hidden = !shown.has(figure.dataset.model) || (number !== "" && figure.dataset.sample !== number);
      }
      videos.style.setProperty("--count", String(figures.filter((figure) => !figure.hidden).length));
    }
  };
  const current = () => {
    const own = document.activeElement === null ? null : document.activeElement.closest(".card");
    const seen = (card) => !card.hidden && card.getBoundingClientRect().bottom > 80;
    return own !== null && !own.hidden ? own : cards.find(seen);
  };
  const beside = (card, count) => {
    const shown = cards.filter((other) => !other.hidden);
    return shown[Math.max(0, Math.min(shown.length - 1, shown.indexOf(card) + count))];
  };
  const goTo = (count) => {
    if (compare.open) { another(count); return; }
    const next = beside(current(), document.activeElement.closest(".card") ? count : 0);
    if (next !== undefined) { next.focus({ preventScroll: true }); next.scrollIntoView({ block: "center" }); }
  };

  /* ---- A/B ---- */
  let compared = null;           /* the card */
  const chosen = [null, null];  /* labels last compared: kept from prompt to prompt */
  const places = (card) => {
    const frames = [...card.querySelectorAll(".frame[data-video]:not([data-state])")];
    return frames.filter((frame) => !frame.parentElement.hidden);
  };
  const modelOf = (frame) => frame.parentElement.dataset.model;
  const fill = () => {
    wipe.querySelectorAll("video").forEach(detach);
    wipe.querySelectorAll(".mark").forEach((text) => text.remove());
    delete wipe.dataset.state;
    sides.forEach((side, which) => {
      const label = side.selectedOptions[0].textContent;
      const video = attach(wipe, side.value, label);
      if (video !== null) { video.classList.toggle("top", which === 1); } else { mark(wipe, "still being read"); }
      wipe.querySelector(which === 0 ? ".a" : ".b").textContent = (which === 0 ? "A: " : "B: ") + label;
      chosen[which] = label;
    });
  };
  const offer = (card) => {
    const frames = places(card), labels = frames.map((frame) => frame.dataset.name);
    const other = frames.findIndex((frame) => modelOf(frame) !== modelOf(frames[0]));
    const pick = [0, other > 0 ? other : 1].map((place, which) => {
      const kept = labels.indexOf(chosen[which]);
      return kept >= 0 ? kept : place;
    });
    if (pick[0] === pick[1]) { pick[1] = pick[0] === 0 ? 1 : 0; }
    compared = card;
    byId("compared").textContent = card.querySelector("h3").textContent;
    sides.forEach((side, which) => {
      side.replaceChildren(...frames.map((frame, place) => {
        const option = new Option(frame.dataset.name, frame.dataset.video);
        option.selected = place === pick[which];
        return option;
      }));
    });
    fill();
  };
  const open = (card) => {
    if (places(card).length < 2) { return; }
    compare.append(bar);  /* a dialog's outside takes no clicks */
    compare.showModal();
    offer(card);
  };
  const another = (count) => {
    for (let card = beside(compared, count), last = compared; card !== last; last = card, card = beside(card, count)) {
      if (places(card).length > 1) { offer(card); card.scrollIntoView({ block: "center" }); return; }
    }
  };
  const close = () => {
    wipe.querySelectorAll("video").forEach(detach);
    body.append(bar);
    if (compared !== null) { compared.focus({ preventScroll: true }); }
  };
  const swap = () => {
    const [a, b] = sides.map((side) => side.selectedIndex);
    sides[0].selectedIndex = b;
    sides[1].selectedIndex = a;
    fill();
  };
  const cut = (share) => {
    const value = Math.max(0, Math.min(100, share));
    wiper.value = String(value);
    wipe.style.setProperty("--wipe", value + "%");
  };
  const drag = (event) => {
    const box = wipe.getBoundingClientRect();
    if (event.buttons & 1) { cut((event.clientX - box.left) / box.width * 100); }
  };

  /* ---- copying, theme, keys ---- */
  const copy = async (button) => {
    const card = button.closest(".card"), words = card.querySelectorAll(".words bdi");
    const text = (words.length === 1 ? words[0] : card.querySelector("h3")).textContent;
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
  const theme = () => {
    const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  };
  const details = () => {
    const card = current(), parts = card === undefined ? [] : [...card.querySelectorAll("figure details")];
    const shut = parts.some((part) => !part.open);
    parts.forEach((part) => { part.open = shut; });
  };
  const keys = {
    " ": toggle, ArrowRight: () => step(1), ArrowLeft: () => step(-1), l: () => { loop.checked = !loop.checked; },
    Home: () => goToFrame(0), "/": () => search.focus(), j: () => goTo(1), k: () => goTo(-1),
    t: theme, d: details, "?": () => help.showModal(), x: swap,
    c: () => { const card = current(); if (card !== undefined) { open(card); } },
    "[": () => cut(Number(wiper.value) - 5), "]": () => cut(Number(wiper.value) + 5),
  };
  const comparing = [" ", "ArrowRight", "ArrowLeft", "Home", "l", "j", "k", "t", "x", "[", "]"];
  const allowed = (key) => {
    if (help.open) { return false; }
    return compare.open ? comparing.includes(key) : !["x", "[", "]"].includes(key);
  };
  document.addEventListener("keydown", (event) => {
    const { key, target } = event;
    if (target === search && key === "Escape") { search.value = ""; choose(); search.blur(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey || target.closest("select, input[type=search]")) { return; }
    if (target.closest("input[type=range]") && /^(Arrow|Home|End|Page)/.test(key)) { return; }
    if (key === " " && target.closest("input:not([type=range]), button, summary")) { return; }
    if (Object.hasOwn(keys, key) && allowed(key)) { event.preventDefault(); keys[key](); }
  });

  play.addEventListener("click", toggle);
  scrub.addEventListener("input", () => goToFrame(Number(scrub.value)));
  speed.addEventListener("change", () => live.forEach((video) => { video.playbackRate = rate(); }));
  search.addEventListener("input", choose);
  filters.forEach((filter) => filter.addEventListener("change", choose));
  models.forEach((box) => box.addEventListener("change", chooseFigures));
  if (sample !== null) { sample.addEventListener("change", chooseFigures); }
  size.addEventListener("change", () => root.style.setProperty("--side", size.value));
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.copy, button.compare");
    if (button !== null) { button.classList.contains("copy") ? copy(button) : open(button.closest(".card")); }
  });
  sides.forEach((side) => side.addEventListener("change", fill));
  byId("swap").addEventListener("click", swap);
  byId("before").addEventListener("click", () => another(-1));
  byId("after").addEventListener("click", () => another(1));
  byId("done").addEventListener("click", () => compare.close());
  compare.addEventListener("close", close);
  wiper.addEventListener("input", () => cut(Number(wiper.value)));
  wipe.addEventListener("pointerdown", drag);
  wipe.addEventListener("pointermove", drag);
  byId("theme").addEventListener("click", theme);
  byId("keys").addEventListener("click", () => help.showModal());
  byId("helpdone").addEventListener("click", () => help.close());
  choose();
  chooseFigures();
  show();
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) { go(); }
  body.dataset.ready = "true";
})();
