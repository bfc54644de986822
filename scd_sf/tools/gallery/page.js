"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const { single } = document.body.dataset;
  const fps = Number(document.body.dataset.fps), frames = Number(document.body.dataset.frames), length = frames / fps;
  const play = byId("play"), scrub = byId("scrub"), loop = byId("loop"), speed = byId("speed"), search = byId("search");
  const live = new Set();  /* the videos near the screen */
  let playing = false, clock = 0, last = 0, corrected = 0, resting = 0;

  /* A video exists only while its place is near the screen. */
  const address = (name) => {
    if (!single) { return `videos/${name}.mp4`; }
    const bytes = Uint8Array.from(atob(byId(`video-${name}`).textContent), (sign) => sign.charCodeAt(0));
    return URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  };
  const attach = (frame) => {
    const video = document.createElement("video");
    Object.assign(video, { muted: true, playsInline: true, preload: "auto", src: address(frame.dataset.video) });
    video.setAttribute("aria-label", frame.dataset.name);
    video.addEventListener("loadedmetadata", () => {
      frame.style.aspectRatio = `${video.videoWidth} / ${video.videoHeight}`;
      frame.classList.toggle("small", video.videoWidth < 200);
      follow(video);
    });
    video.addEventListener("error", () => {
      if (!live.has(video)) { return; }
      detach(frame);
      watcher.unobserve(frame);
      frame.dataset.state = "broken";
      frame.textContent = "video cannot be played";
    });
    frame.append(video);
    live.add(video);
  };
  const detach = (frame) => {
    const video = frame.querySelector("video"), source = video.src;
    live.delete(video);
    video.removeAttribute("src");
    video.load();
    video.remove();
    if (single) { URL.revokeObjectURL(source); }
  };
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const there = target.querySelector("video") !== null;
      if (isIntersecting && !there) { attach(target); }
      if (!isIntersecting && there) { detach(target); }
    }
  }, { rootMargin: "200px" });
  all(".frame[data-video]").forEach((frame) => watcher.observe(frame));

  /* One clock for all. It points at a frame's first quarter, so that rounding shows no neighbour. */
  const seek = (video, within = 0.25) => {
    const end = Number.isFinite(video.duration) ? video.duration : length;
    video.currentTime = Math.min(clock, end - 0.75 / fps) + within / fps;
  };
  const follow = (video) => {
    if (!playing) { video.pause(); }
    if (!playing || Math.abs(video.currentTime - clock) > 1 / fps) { seek(video); }
    if (playing) {
      video.playbackRate = Number(speed.value);
      video.play().catch(() => undefined);
    }
  };
  const show = () => {
    const frame = Math.min(frames - 1, Math.floor(clock * fps + 1e-6));
    scrub.value = String(frame);
    byId("where").textContent = `frame ${frame + 1} of ${frames}`;
    play.textContent = playing ? "Pause" : "Play";
    document.body.dataset.playing = String(playing);
  };
  /* While videos play, the clock is their median: a slow machine slows all of them alike, and only strays are moved. */
  const tick = (now) => {
    if (!playing) { return; }
    const running = [...live].filter((video) => video.readyState >= 2 && !video.seeking && !video.ended);
    const times = running.map((video) => video.currentTime).sort((a, b) => a - b);
    clock = times.length > 0 ? times[times.length >> 1] : clock + (now - last) / 1000 * Number(speed.value);
    last = now;
    if (clock >= length - 0.25 / fps) {
      if (!loop.checked) { goToFrame(frames - 1); return; }
      clock = 0;
      live.forEach(follow);
    } else if (now - corrected > 1000) {
      corrected = now;
      running.filter((video) => video.paused || Math.abs(video.currentTime - clock) > 4 / fps).forEach(follow);
    }
    show();
    requestAnimationFrame(tick);
  };
  const goToFrame = (frame) => {
    playing = false;
    clock = frame / fps;
    live.forEach(follow);
    show();
    /* Chromium now and then does not paint what it sought: all once more when the slider rests, a little further. */
    clearTimeout(resting);
    resting = setTimeout(() => { if (!playing) { live.forEach((video) => seek(video, 0.35)); } }, 250);
  };
  const currentFrame = () => Math.floor(clock * fps + 1e-6);
  const toggle = () => {
    if (playing) { goToFrame(currentFrame()); return; }
    if (clock >= length - 1 / fps) { clock = 0; }
    playing = true;
    last = performance.now();
    live.forEach(follow);
    show();
    requestAnimationFrame(tick);
  };

  /* Which prompts and models are shown. */
  const cards = all(".card"), filters = all("select[data-filter]"), models = all("input[data-model]");
  const texts = cards.map((card) => [...card.querySelectorAll("h3, .words")].map((part) => part.textContent.toLowerCase()).join(" "));
  const choose = () => {
    const words = search.value.toLowerCase().split(/\s+/);
    const fits = (card) => filters.every(({ value, dataset }) => value === "" || card.dataset["tag" + dataset.filter] === value);
    cards.forEach((card, place) => { card.hidden = !(fits(card) && words.every((word) => texts[place].includes(word))); });
    const count = cards.filter((card) => !card.hidden).length;
    byId("found").textContent = `${count} of ${cards.length} prompts`;
    const shown = new Set(models.filter((box) => box.checked).map((box) => box.dataset.model));
    all("figure").forEach((figure) => { figure.hidden = !shown.has(figure.dataset.model); });
  };
  const copy = (button) => {
    const prompt = button.closest(".card").querySelector(".words bdi, h3");
    getSelection().selectAllChildren(prompt);  /* for those whose browser lets no page copy */
    navigator.clipboard.writeText(prompt.textContent).catch(() => undefined);
  };

  const keys = {
    " ": toggle,
    ArrowRight: () => goToFrame((currentFrame() + 1) % frames),
    ArrowLeft: () => goToFrame((currentFrame() + frames - 1) % frames),
    "/": () => search.focus(),
  };
  document.addEventListener("keydown", (event) => {
    const { key, target } = event;
    const own = target.closest("select, input[type=search]") || (key === " " && target.closest("button, summary, [type=checkbox]"));
    const slides = target === scrub && key.startsWith("Arrow");
    if (event.ctrlKey || event.metaKey || event.altKey || own || slides || !Object.hasOwn(keys, key)) { return; }
    event.preventDefault();
    keys[key]();
  });
  play.addEventListener("click", toggle);
  scrub.addEventListener("input", () => goToFrame(Number(scrub.value)));
  speed.addEventListener("change", () => live.forEach(follow));
  byId("size").addEventListener("change", (event) => document.body.style.setProperty("--side", event.target.value));
  search.addEventListener("input", choose);
  [...filters, ...models].forEach((choice) => choice.addEventListener("change", choose));
  all("button.copy").forEach((button) => button.addEventListener("click", () => copy(button)));
  choose();
  show();
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) { toggle(); }
  document.body.dataset.ready = "true";
})();
