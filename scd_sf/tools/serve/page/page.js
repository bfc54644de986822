// The page of `scd serve`. Text from elsewhere is written by textContent alone.
"use strict";

const at = (id) => document.getElementById(id);
const HEAD = 16; // bytes before a frame's picture: frame, chunk, flags and microseconds (big-endian)
const IS_H264 = 1, IS_KEY = 2; // flags
const LATE = 5000; // milliseconds after which a picture counts as held back by the decoder
const stage = at("picture").getContext("2d");
const waits = [1, 2, 4, 8]; // seconds before it connects again

let socket = null, ready = null, tries = 0, fileName = "", token = "";
let watching = false; // watches along, or wants to: the clip is another page's
let hadSeat = false; // and was cut
let again = 0; // the timer until it connects again
const WAITING = "Making the first frame ..";
const NO_PROMPT = "(no prompt)";
const PAUSED = "The viewer has paused.";
const LOST = "The seat is taken: by somebody else, or for some seconds by the lost connection of this page. It tries again by itself.";
let playing = false, paused = false, hasPicture = false;
let isSending = false, hasClip = false; // a start image is on its way; there is something to download
let clip = 0; // counts the clips of this page: pictures of an earlier one are not shown
let buffer = []; // frames that wait: {frame, chunk, bitmap (a promise)}
let ends = new Map(); // chunk -> its last frame
let due = 0, shownTimes = [], arrivals = []; // arrivals: [time, bytes]
let config = null, noH264 = ""; // how H.264 is decoded; null: pictures are JPEGs, for this reason
let decoder = null, decoding = new Map(); // microseconds -> the entry whose picture is decoded
let camera = null, fromCamera = false; // the stream of a camera that is on; the clip is made from it
let isCapturing = false, captured = 0, sentAt = new Map(); // frames of the camera: number -> when it was sent
const capture = document.createElement("canvas");
const CAMERA_MARK = [0x63, 0x61, 0x6d, 0]; // before a frame: this, its number (big-endian), a JPEG
const UNSENT = 2 ** 18; // bytes that wait to be sent, beyond which the camera's frames are left out

function message(text) { at("message").textContent = text; }
function said(text, isBad = false) {
  at("said").textContent = text;
  at("said").classList.toggle("bad", isBad);
}
function complain(text) { said(text, true); }
function send(object) { if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(object)); }

function takeToken() {
  // the fragment is never sent to a server; it leaves the address bar, too
  const fragment = location.hash.slice(1);
  if (fragment) {
    sessionStorage.setItem("token", fragment);
    history.replaceState(null, "", location.pathname);
  }
  token = fragment || sessionStorage.getItem("token") || "";
}

function connect(watch = watching) {
  watching = watch;
  clearTimeout(again);
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(`${scheme}//${location.host}/live`);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => send({ type: "hello", token, watch });
  socket.onmessage = (event) => typeof event.data === "string" ? hear(JSON.parse(event.data)) : take(event.data);
  socket.onclose = (event) => {
    at("take").hidden = true;
    at("watchers").textContent = "";
    const wasReady = ready !== null;
    ready = null;
    reset();
    playing = false;
    fromCamera = false;
    withoutPicture();
    hasClip = false;
    // a complaint may be why
    if (!at("said").classList.contains("bad")) said("");
    buttons();
    const wait = waits[Math.min(tries++, waits.length - 1)];
    if (event.code === 1013 && watching) {
      message("Too many watch along. This page waits for the seat.");
      watching = false;
      buttons();
    } else if (event.code === 1013) message(hadSeat ? LOST : "Somebody else has the seat. This page tries again by itself.");
    else if (event.code === 1008 && !wasReady) {
      message("Refused: open the whole address that the server printed, with its token.");
      return;
    } else message("The connection is gone. This page tries again by itself.");
    again = setTimeout(() => connect(), (event.code === 1013 ? waits.at(-1) : wait) * 1000);
  };
}

// another connection, for another part: with the seat, or watching along
function connectAs(watch) {
  if (socket) {
    socket.onopen = socket.onclose = socket.onmessage = null;
    socket.close();
  }
  ready = null;
  reset();
  playing = hasClip = hadSeat = false;
  withoutPicture();
  stopCamera();
  for (const figure of document.querySelectorAll("#figures dd")) figure.textContent = "-";
  at("frame").textContent = "0";
  at("watch").hidden = at("take").hidden = true;
  at("watchers").textContent = "";
  message("Connecting ..");
  said("");
  buttons();
  connect(watch);
}

function hear(reply) {
  if (reply.type === "ready" || reply.type === "watching") {
    ready = reply;
    tries = 0;
    at("watch").hidden = true;
    at("picture").width = reply.width;
    at("picture").height = reply.height;
    at("picture").classList.toggle("small", reply.width < 320);
    at("model").textContent = reply.model;
    hadSeat = !watching;
    message(watching ? "You watch along. Nothing plays yet." : "Type a prompt and press Start.");
    config = null;
    noH264 = "watching along";
    if (!watching) {
      chooseCodec(reply);
      offerStrengths(reply.levels);
      at("prompt").maxLength = reply.most_prompt;
      document.body.dataset.ready = "true";
    }
  } else if (reply.type === "busy") {
    at("watch").hidden = !reply.may_watch;
  } else if (reply.type === "seat") {
    at("take").hidden = !reply.is_free;
    if (reply.is_free) playing = false;
    if (reply.is_free && at("message").textContent === PAUSED) message("");
    said(reply.is_free ? "Nobody has the seat: take it, or wait for the next clip." : "Somebody has the seat; what it plays is shown here.");
  } else if (reply.type === "paused") {
    message(reply.on ? PAUSED : "");
  } else if (reply.type === "missed") {
    complain(`This page is slower than the video: ${reply.chunks} chunks were left out.`);
  } else if (reply.type === "watchers") {
    at("watchers").textContent = reply.count ? `${reply.count} watching along` : "";
  } else if (reply.type === "started") {
    reset();
    playing = true;
    hasClip = !watching;
    message("");
    said(`seed ${reply.seed}: ${reply.prompt.trim() || NO_PROMPT}`);
  } else if (reply.type === "chunk") {
    ends.set(reply.chunk, reply.first + reply.frames - 1);
    at("dit-fps").textContent = reply.dit_fps.toFixed(1);
    at("vae-fps").textContent = reply.vae_fps.toFixed(1);
    at("first").textContent = `${reply.first_seconds.toFixed(2)} s`;
    if (sentAt.has(reply.camera)) at("lag").textContent = `${(performance.now() - sentAt.get(reply.camera)).toFixed(0)} ms`;
    for (const number of sentAt.keys()) if (number <= reply.camera) sentAt.delete(number);
  } else if (reply.type === "switched") {
    said(`from frame ${reply.frame}: ${reply.prompt.trim() || NO_PROMPT}`);
  } else if (reply.type === "ended") {
    playing = fromCamera = false;
    said(`The clip is complete: ${reply.frames} frames.`);
    if (watching && !due && !buffer.length) message("This clip is over; the next one is shown here.");
  } else if (reply.type === "picture") {
    hasPicture = true;
    isSending = false;
    said("The next clip begins with the picture.");
  } else if (reply.type === "file") {
    fileName = reply.name;
  } else if (reply.type === "error") {
    if (reply.ended) playing = fromCamera = false;
    if (!playing && at("message").textContent === WAITING) message("Type a prompt and press Start.");
    if (isSending) withoutPicture();
    complain(reply.message);
  }
  buttons();
}

function take(data) {
  arrivals.push([performance.now(), data.byteLength]);
  if (fileName) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([data], { type: "application/zip" }));
    link.download = fileName;
    fileName = "";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    said("Downloaded: the video and its manifest.");
    return;
  }
  const head = new DataView(data, 0, HEAD), flags = head.getUint8(8);
  const entry = { frame: head.getUint32(0), chunk: head.getUint32(4), bitmap: null, clip, h264: (flags & IS_H264) > 0, since: performance.now() };
  at("codec").textContent = entry.h264 ? "H.264" : config ? "JPEG" : `JPEG (${noH264})`;
  if (!entry.h264) place(entry, new Blob([new Uint8Array(data, HEAD)], { type: "image/jpeg" }));
  else if (!config) return drop(entry);
  buffer.push(entry);
  if (entry.h264) decode(entry, head.getUint32(8) % 2 ** 24 * 2 ** 32 + head.getUint32(12), flags & IS_KEY, new Uint8Array(data, HEAD));
}

async function place(entry, source) {
  try {
    const bitmap = await createImageBitmap(source);
    if (entry.clip === clip) entry.bitmap = bitmap;
    else bitmap.close();
  } catch {
    complain(`frame ${entry.frame} could not be decoded`);
  }
}

// H.264 where server and browser have it
async function chooseCodec(server) {
  const wanted = { codec: server.h264, codedWidth: server.width, codedHeight: server.height, optimizeForLatency: true };
  noH264 = server.no_h264;
  if (!noH264 && !window.isSecureContext) noH264 = "no H.264 without https or localhost";
  else if (!noH264 && !window.VideoDecoder) noH264 = "this browser has no VideoDecoder";
  if (noH264) return;
  noH264 = "this browser does not decode H.264";
  const answer = await VideoDecoder.isConfigSupported(wanted).catch(() => ({ supported: false }));
  if (!answer.supported || ready !== server) return;
  config = wanted;
  send({ type: "codec", codec: "h264" });
}

function decode(entry, microseconds, isKey, data) {
  try {
    if (!decoder) {
      decoder = new VideoDecoder({
        output: async (frame) => {
          const shown = decoding.get(frame.timestamp);
          decoding.delete(frame.timestamp);
          if (shown) await place(shown, frame);
          frame.close();
        },
        error: (error) => useJpeg(error.message),
      });
      decoder.configure(config);
    }
    decoding.set(microseconds, entry);
    decoder.decode(new EncodedVideoChunk({ type: isKey ? "key" : "delta", timestamp: microseconds, data }));
  } catch (error) {
    useJpeg(error.message);
  }
}

// JPEGs from the next chunk on; what the decoder still holds is given up
function useJpeg(reason) {
  if (!config) return;
  config = null;
  noH264 = reason;
  closeDecoder();
  send({ type: "codec", codec: "jpeg" });
  const lost = buffer.filter((entry) => entry.h264 && !entry.bitmap);
  buffer = buffer.filter((entry) => !entry.h264 || entry.bitmap);
  lost.forEach(drop);
  said(`H.264 failed (${reason}); JPEGs from here on.`);
}

function drop(entry) {
  if (ends.get(entry.chunk) === entry.frame) send({ type: "shown", chunk: entry.chunk });
}

function closeDecoder() {
  if (decoder && decoder.state !== "closed") decoder.close();
  decoder = null;
  decoding = new Map();
}

function reset() {
  for (const entry of buffer) if (entry.bitmap) entry.bitmap.close();
  buffer = [];
  closeDecoder();
  ends = new Map();
  clip += 1;
  due = 0;
  paused = false;
}

function show(now) {
  requestAnimationFrame(show);
  if (buffer.length && buffer[0].h264 && !buffer[0].bitmap && now - buffer[0].since > LATE) useJpeg("the decoder holds pictures back");
  if (!ready || paused || !buffer.length || !buffer[0].bitmap || now < due) return tell(now);
  // keep the pace while frames are there; after a wait begin it anew
  due = Math.max(due, now - 1000 / ready.fps) + 1000 / ready.fps;
  const entry = buffer.shift();
  stage.drawImage(entry.bitmap, 0, 0);
  entry.bitmap.close();
  shownTimes.push(now);
  at("frame").textContent = entry.frame;
  document.body.dataset.frame = entry.frame;
  if (ends.get(entry.chunk) === entry.frame) {
    ends.delete(entry.chunk);
    send({ type: "shown", chunk: entry.chunk });
  }
  tell(now);
}

function tell(now) {
  while (shownTimes.length && shownTimes[0] < now - 2000) shownTimes.shift();
  at("ahead").textContent = buffer.length;
  while (arrivals.length && arrivals[0][0] < now - 2000) arrivals.shift();
  at("rate").textContent = (arrivals.reduce((sum, [, bytes]) => sum + bytes, 0) / 2000).toFixed(0);
  at("page-fps").textContent = (shownTimes.length / 2).toFixed(1);
}

function buttons() {
  const mine = ready && !watching;
  at("controls").hidden = at("keys").hidden = watching;
  at("start").disabled = at("file").disabled = !mine || isSending;
  at("start").textContent = playing && mine ? "Restart" : "Start";
  at("change").disabled = at("pause").disabled = !mine || !playing;
  at("download").disabled = !mine || !hasClip;
  at("pause").textContent = paused ? "Go on" : "Pause";
  at("without").hidden = !hasPicture;
  at("camera").disabled = !mine;
  at("camera").textContent = camera ? "Camera off" : "Camera";
  at("strengths").hidden = at("view").hidden = at("lagging").hidden = !camera;
}

function withoutPicture() {
  hasPicture = isSending = false;
  at("file").value = "";
}

function start() {
  if (!ready || watching || isSending) return;
  const seed = Math.min(Math.max(Math.trunc(Number(at("seed").value)) || 0, 0), Number.MAX_SAFE_INTEGER);
  at("seed").value = seed;
  if (!playing) message(WAITING);
  fromCamera = camera !== null;
  send({ type: "start", prompt: at("prompt").value, seed, picture: hasPicture && !camera, camera: fromCamera, strength: strength() });
}

function offerStrengths(levels) {
  const slider = at("strength");
  slider.max = levels.length - 1;
  // the most noise that is not above 0.8, else the least
  const place = levels.findIndex((level) => level <= 0.8);
  slider.value = levels.length - 1 - (place < 0 ? levels.length - 1 : place);
  showStrength();
}

// the slider's right end is pure noise
function strength() { return ready ? ready.levels[ready.levels.length - 1 - Number(at("strength").value)] : 1; }

function showStrength() {
  at("level").textContent = strength();
  at("strength").setAttribute("aria-valuetext", strength()); // the slider's own value is a place in the list
}

async function switchCamera() {
  if (camera) {
    if (fromCamera && playing) send({ type: "camera_off" });
    return stopCamera();
  }
  if (!ready || watching) return;
  if (!window.isSecureContext || !navigator.mediaDevices) {
    complain("Browsers give cameras to secure pages alone: open this one as http://127.0.0.1 or http://localhost (ssh -L), or by https.");
    return;
  }
  const video = { width: { ideal: ready.width }, height: { ideal: ready.height }, frameRate: { ideal: ready.fps } };
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video, audio: false });
    if (camera || !ready || watching) {
      for (const track of stream.getTracks()) track.stop();
      return;
    }
    camera = stream;
    camera.getVideoTracks()[0].addEventListener("ended", () => { if (camera === stream) switchCamera(); });
    at("view").srcObject = camera;
    await at("view").play();
    said("The next clip is made from the camera: press Start. No student is trained for this.");
  } catch (error) {
    stopCamera();
    const remedy = error.name === "NotAllowedError" ? "; allow it for this page, beside the browser's address line" : "";
    complain(`The camera cannot be used: ${error.message}${remedy}`);
  }
  buttons();
}

function stopCamera() {
  if (camera) for (const track of camera.getTracks()) track.stop();
  camera = at("view").srcObject = null;
  fromCamera = false;
  sentAt = new Map();
  buttons();
}

// a frame of the camera, cropped at the middle to the model's size
function sendFrame() {
  const view = at("view");
  if (!ready || !camera || !fromCamera || paused || socket.bufferedAmount > UNSENT || view.readyState < 2) return;
  const scale = Math.max(ready.width / view.videoWidth, ready.height / view.videoHeight);
  const width = ready.width / scale, height = ready.height / scale;
  capture.width = ready.width;
  capture.height = ready.height;
  capture.getContext("2d").drawImage(view, (view.videoWidth - width) / 2, (view.videoHeight - height) / 2, width, height, 0, 0, ready.width, ready.height);
  isCapturing = true;
  capture.toBlob(async (blob) => {
    const picture = blob ? new Uint8Array(await blob.arrayBuffer()) : null;
    isCapturing = false;
    if (!picture || !fromCamera || socket.readyState !== WebSocket.OPEN) return;
    const data = new Uint8Array(8 + picture.length);
    data.set(CAMERA_MARK);
    new DataView(data.buffer).setUint32(4, captured);
    data.set(picture, 8);
    if (sentAt.size > 1000) sentAt.clear();
    sentAt.set(captured, performance.now());
    captured += 1;
    socket.send(data);
  }, "image/jpeg", 0.85);
}

// at the model's rate, by the clock: a timer alone drifts; late rather than not at all where the last one is still encoded
function captureFrames(next = performance.now()) {
  const now = performance.now();
  if (now >= next && !isCapturing) {
    sendFrame();
    next = Math.max(next + 1000 / (ready ? ready.fps : 16), now - 100);
  }
  setTimeout(() => captureFrames(next), Math.max(1, next - performance.now()));
}

function change() {
  if (playing && !watching) send({ type: "prompt", prompt: at("prompt").value, history: at("history").value });
  else start();
}

function pause() {
  if (!playing || watching) return;
  paused = !paused;
  send({ type: "pause", on: paused });
  buttons();
}

async function upload() {
  const file = at("file").files[0];
  if (!file || !ready || watching) return;
  if (file.size > ready.most_picture) {
    withoutPicture();
    buttons();
    complain(`The picture is larger than ${ready.most_picture} bytes; choose a smaller one.`);
    return;
  }
  hasPicture = false;
  isSending = true; // until the server has answered, no clip starts without it
  said("Sending the picture ..");
  buttons();
  const asked = socket, data = await file.arrayBuffer();
  if (socket === asked) socket.send(data);
}

at("controls").addEventListener("submit", (event) => { event.preventDefault(); change(); });
at("start").addEventListener("click", start);
at("watch").addEventListener("click", () => connectAs(true));
at("take").addEventListener("click", () => connectAs(false));
at("pause").addEventListener("click", pause);
at("download").addEventListener("click", () => { said("Making the file .."); send({ type: "download" }); });
at("file").addEventListener("change", upload);
at("camera").addEventListener("click", switchCamera);
at("strength").addEventListener("input", showStrength);
at("strength").addEventListener("change", () => { if (fromCamera) send({ type: "strength", strength: strength() }); });
at("without").addEventListener("click", () => { withoutPicture(); buttons(); });
at("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  if (!event.repeat) change();
});
document.addEventListener("keydown", (event) => {
  if (event.repeat && event.key === "Enter" && event.target.matches("button")) event.preventDefault(); // held down it asks once
  if (event.target.matches("textarea, input, select, button") || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = { " ": pause, r: start, "/": () => at("prompt").focus(), f: () => at("stage").requestFullscreen() }[event.key.toLowerCase()];
  if (!action) return;
  event.preventDefault();
  if (!event.repeat) action();
});

takeToken();
connect();
captureFrames();
requestAnimationFrame(show);
