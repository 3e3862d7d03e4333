// The page: microphone or recording -> spotter -> bars. ?wav=URL opens a recording at once.
import { loadSpotter } from './spotter.js';

const HEARD = 0.5; // probability from which a word counts as heard
const STAYS = 1500; // ms for which it is shown
const SILENCE = 0.4; // seconds, before a recording and after it, where its last word may still be heard

const at = (id) => document.getElementById(id);
const say = (text) => { at('status').textContent = text; };
const kB = (bytes) => `${(bytes / 1000).toFixed(1)} kB`;

const spotter = await loadSpotter().catch((error) => { say(error.message); throw error; });
const names = [...spotter.words.map((word) => word.replace('_', ' ')), 'anything else'];
const rows = names.map((name, number) => {
  const row = document.createElement('li');
  row.className = number < spotter.words.length ? '' : 'other';
  row.innerHTML = '<span class="name"></span><div class="track"><div class="bar"></div></div><span class="number"></span>';
  row.querySelector('.name').textContent = name;
  at('bars').append(row);
  return { row, bar: row.querySelector('.bar'), number: row.querySelector('.number') };
});

let heard = -1, since = 0, open = null; // the word that is shown, since when; the microphone and its context
let turn = 0; // counts what was listened to, so that the last recording stops when another begins
const history = []; // of a recording: the means at each frame, for the tests

function frame(means) {
  for (let word = 0; word < spotter.words.length; word++) {
    if (means[word] > HEARD) [heard, since] = [word, performance.now()];
  }
  if (!open) history.push([...means]);
}

function draw(values = spotter.means) {
  if (open && performance.now() - since > STAYS) heard = -1;
  values.forEach((mean, number) => {
    const { row, bar, number: text } = rows[number];
    bar.style.transform = `translateX(${100 * mean - 100}%)`;
    text.textContent = Math.round(100 * mean);
    row.classList.toggle('heard', number === heard);
  });
  at('word').textContent = heard < 0 ? '…' : names[heard];
  at('word').classList.toggle('heard', heard >= 0);
}

function begin() {
  spotter.reset();
  history.length = 0;
  heard = -1;
  return ++turn;
}

async function listen() {
  if (open) {
    open.microphone.getTracks().forEach((track) => track.stop());
    await open.context.close();
    open = null;
    at('listen').textContent = 'Listen';
    return say('');
  }
  try {
    const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    const microphone = await navigator.mediaDevices.getUserMedia({ audio: plain });
    const context = new AudioContext({ sampleRate: spotter.rate }); // the browser resamples
    await context.audioWorklet.addModule('capture.js');
    const capture = new AudioWorkletNode(context, 'capture', { numberOfOutputs: 0, channelCount: 1, channelCountMode: 'explicit' });
    context.createMediaStreamSource(microphone).connect(capture);
    begin();
    open = { microphone, context };
    capture.port.onmessage = ({ data }) => open && spotter.push(data, frame);
    const show = () => { draw(); if (open) requestAnimationFrame(show); };
    show();
    at('listen').textContent = 'Stop';
    say(`Say ${names.slice(0, -1).join(', ')}.`);
  } catch (error) {
    say(`The microphone cannot be used (${error.message}). Open a recording instead.`);
  }
}

async function play(data, name) {
  if (open) await listen();
  let sound;
  try {
    const decoded = await new OfflineAudioContext(1, 1, spotter.rate).decodeAudioData(data.slice(0)); // resampled as well
    sound = new Float32Array(decoded.length + 2 * SILENCE * spotter.rate);
    sound.set(decoded.getChannelData(0), SILENCE * spotter.rate);
  } catch {
    return say(`${name} is not a recording that this browser can read.`);
  }
  const mine = begin();
  const audible = new Audio(URL.createObjectURL(new Blob([data])));
  audible.play().catch(() => {}); // before the first click, browsers stay silent
  const began = performance.now();
  let done = 0;
  say(`Playing ${name}`);
  const show = () => {
    if (mine !== turn) return audible.pause();
    const due = Math.min(Math.floor((performance.now() - began) * spotter.rate / 1000), sound.length);
    spotter.push(sound.subarray(done, due), frame);
    done = due;
    if (done < sound.length) {
      draw();
      return void requestAnimationFrame(show);
    }
    const likeliest = (means) => Math.max(...means.slice(0, -1));
    draw(history.reduce((best, means) => (likeliest(means) > likeliest(best) ? means : best))); // the clearest moment
    say(heard < 0 ? `None of the words in ${name}` : `Heard in ${name}`);
    window.spotted = { word: heard < 0 ? null : spotter.words[heard], history };
  };
  show();
}

const choose = async (file) => file && play(await file.arrayBuffer(), file.name);
at('file').onchange = ({ target }) => choose(target.files[0]);
for (const [event, over] of [['dragover', true], ['dragleave', false], ['drop', false]]) {
  addEventListener(event, (dropped) => {
    dropped.preventDefault();
    document.body.classList.toggle('over', over);
    if (event === 'drop') choose(dropped.dataTransfer.files[0]);
  });
}

at('network').textContent = kB(spotter.bytes.network);
at('code').textContent = kB(spotter.bytes.code);
at('time').textContent = `${Math.round(spotter.microseconds())} µs`;
if (navigator.mediaDevices?.getUserMedia) {
  at('listen').disabled = false;
  at('listen').onclick = listen;
  say('');
} else {
  say('There is no microphone here: open a recording.');
}
draw();
const wav = new URLSearchParams(location.search).get('wav');
if (wav) fetch(wav).then(async (answer) => play(await answer.arrayBuffer(), wav.split('/').pop()));
