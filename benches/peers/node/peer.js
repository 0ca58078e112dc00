'use strict';
// Node.js: `child_process.fork` with JSON or with structured clone, and a unix stream socket (`net`).
//
// The same work as the other peers': every 32-bit word of a request XOR a constant, every word of every answer checked.
// With JSON a body travels as base64, which is how bytes get into JSON; with structured clone as bytes. A fork has one
// channel: many connections are numbered messages on it.
//
// node peer.js net-server PATH | net-client PATH key=value... | fork-client json|advanced key=value... (forks its server)
const net = require('net');
const { fork } = require('child_process');

const MASK_LOW = 0x7f4a7c15, MASK_HIGH = 0x9e3779b9;
const words = (buffer) => new Uint32Array(buffer.buffer, buffer.byteOffset, buffer.byteLength >> 2);
const aligned = (size) => Buffer.from(new ArrayBuffer(size));
const copied = (buffer) => { const copy = aligned(buffer.length); buffer.copy(copy); return copy; };

function fill(nonce, buffer) {
  const w = words(buffer);
  for (let i = 0; i < w.length; i++) w[i] = nonce ^ Math.imul(i + 1, 0x9e3779b1);
}
function answer(buffer) { // In place: the buffer is its own.
  const w = words(buffer);
  for (let i = 0; i < w.length; i += 2) { w[i] ^= MASK_LOW; w[i + 1] ^= MASK_HIGH; }
}
function isRight(nonce, buffer) {
  const w = words(buffer);
  let wrong = 0;
  for (let i = 0; i < w.length; i += 2) {
    wrong |= w[i] ^ MASK_LOW ^ nonce ^ Math.imul(i + 1, 0x9e3779b1);
    wrong |= w[i + 1] ^ MASK_HIGH ^ nonce ^ Math.imul(i + 2, 0x9e3779b1);
  }
  return wrong === 0;
}

// Frames: a length of 32 bits, padded to 8 so that bodies are aligned, then the body.
const HEAD = 8;
class Inbox {
  constructor() { this.rest = null; }
  // Calls `each` with every whole body in what has come.
  push(chunk, each) {
    let buffer = this.rest ? Buffer.concat([this.rest, chunk]) : chunk;
    let at = 0;
    while (buffer.length - at >= HEAD) {
      const end = at + HEAD + buffer.readUInt32LE(at);
      if (end > buffer.length) break;
      const body = buffer.subarray(at + HEAD, end);
      each(body.byteOffset & 3 ? copied(body) : body);
      at = end;
    }
    this.rest = at === buffer.length ? null : buffer.subarray(at);
  }
}

function netServer(path) {
  const server = net.createServer((socket) => {
    const inbox = new Inbox();
    socket.on('error', () => {});
    socket.on('data', (chunk) => {
      const out = [];
      inbox.push(chunk, (body) => {
        const frame = aligned(HEAD + body.length);
        frame.writeUInt32LE(body.length, 0);
        body.copy(frame, HEAD);
        answer(frame.subarray(HEAD));
        out.push(frame);
      });
      if (out.length === 1) socket.write(out[0]);
      else if (out.length > 1) socket.write(Buffer.concat(out));
    });
  });
  server.listen({ path, backlog: 4096 }, () => console.log('ready'));
}

function forkServer() {
  process.on('message', (message) => {
    if (typeof message.b === 'string') {
      const body = copied(Buffer.from(message.b, 'base64'));
      answer(body);
      process.send({ c: message.c, b: body.toString('base64') });
    } else {
      const body = copied(Buffer.from(message.b.buffer, message.b.byteOffset, message.b.byteLength));
      answer(body);
      process.send({ c: message.c, b: body });
    }
  });
  process.send('ready');
}

function planOf(args) {
  const plan = { size: 64, connections: 1, in_flight: 1, think_us: 0, seconds: 1, warm: 0.5, hold: 0 };
  for (const arg of args) {
    const [key, value] = arg.split('=');
    if (key in plan) plan[key] = Number(value);
  }
  return plan;
}

const now = () => process.hrtime.bigint();
class Meter {
  constructor(plan) {
    this.plan = plan;
    this.oneIn = plan.connections * plan.in_flight === 1 ? 1 : 16;
    this.begin = now() + BigInt(Math.round(plan.warm * 1e9));
    this.end = this.begin + BigInt(Math.round(plan.seconds * 1e9));
    this.most = plan.hold ? plan.connections : Infinity;
    this.asked = this.answered = this.wrong = 0;
    this.over = false;
    this.samples = [];
    this.first = this.last = null;
  }
  request() {
    if (this.over || this.asked === this.most) return null;
    this.asked++;
    const begun = this.asked % this.oneIn === 0 ? now() : 0n;
    if (this.most === Infinity && begun >= this.end) { this.asked--; this.over = true; return null; }
    return { nonce: Math.imul(this.asked, 0x9e3779b1), begun };
  }
  answer(call, body) {
    this.answered++;
    if (body.length !== this.plan.size || !isRight(call.nonce, body)) this.wrong++;
    if (call.begun === 0n) return;
    const t = now();
    if (t > this.end) return;
    if (call.begun >= this.begin) this.samples.push(Number(t - call.begun));
    if (t >= this.begin) { this.first ??= [t, this.answered]; this.last = [t, this.answered]; }
  }
  isIdle() { return this.asked === this.answered; }
  report() {
    const s = Float64Array.from(this.samples).sort();
    const q = (part) => s.length ? s[Math.min(s.length - 1, Math.ceil(s.length * part) - 1)] : 0;
    const seconds = this.first ? Number(this.last[0] - this.first[0]) / 1e9 : 0;
    const rate = seconds > 0 ? (this.last[1] - this.first[1]) / seconds : 0;
    console.log(JSON.stringify({
      requests: this.answered, per_second: rate, samples: s.length, p50_ns: q(0.5), p90_ns: q(0.9), p99_ns: q(0.99),
      p999_ns: q(0.999), max_ns: q(1), wrong: this.wrong,
    }));
    process.exit(this.wrong > 0 || !this.isIdle() ? 1 : 0);
  }
}

// Runs the calls: `sends[c](body)` sends a request on connection c; returns what is to be called with its answers.
function drive(plan, sends) {
  const meter = new Meter(plan);
  const calls = sends.map(() => []);
  let held = false;
  const ask = (c) => {
    const call = meter.request();
    if (call) {
      calls[c].push(call);
      sends[c](call.nonce);
    } else if (meter.isIdle() && !held) {
      held = true;
      if (!plan.hold) return meter.report();
      console.log('holding');
      process.stdin.on('end', () => meter.report()).resume();
    }
  };
  const took = (c, body) => {
    meter.answer(calls[c].shift(), body);
    if (!plan.think_us) return ask(c);
    // Timers of Node.js are as coarse as a millisecond and a bit: a sleep of the thread is what the others do.
    setImmediate(() => { Atomics.wait(NOBODY, 0, 0, plan.think_us / 1000); ask(c); });
  };
  return { took, begin: () => { for (let n = 0; n < plan.in_flight; n++) sends.forEach((_, c) => ask(c)); } };
}
const NOBODY = new Int32Array(new SharedArrayBuffer(4));

function netClient(path, plan) {
  const sends = [];
  let connected = 0, run = null;
  for (let c = 0; c < plan.connections; c++) {
    const socket = net.connect({ path });
    const inbox = new Inbox();
    let out = [];
    socket.on('connect', () => { if (++connected === plan.connections) { run = drive(plan, sends); run.begin(); } });
    socket.on('error', (error) => { console.error(error); process.exit(1); });
    socket.on('data', (chunk) => {
      socket.cork(); // What one chunk brings about goes out in one write.
      inbox.push(chunk, (body) => run.took(c, body));
      socket.uncork();
    });
    sends.push((nonce) => {
      const frame = aligned(HEAD + plan.size);
      frame.writeUInt32LE(plan.size, 0);
      fill(nonce, frame.subarray(HEAD));
      socket.write(frame);
    });
  }
}

function forkClient(serialization, plan) {
  const child = fork(__filename, ['fork-server'], { serialization });
  console.log('server ' + child.pid);
  const json = serialization === 'json';
  const sends = [];
  for (let c = 0; c < plan.connections; c++) {
    sends.push((nonce) => {
      const body = aligned(plan.size);
      fill(nonce, body);
      child.send({ c, b: json ? body.toString('base64') : body });
    });
  }
  let run = null;
  child.on('message', (message) => {
    if (message === 'ready') {
      process.stdin.once('data', () => { run = drive(plan, sends); run.begin(); });
      return;
    }
    const body = json ? copied(Buffer.from(message.b, 'base64'))
      : copied(Buffer.from(message.b.buffer, message.b.byteOffset, message.b.byteLength));
    run.took(message.c, body);
  });
  process.on('exit', () => child.kill());
}

const [mode, first, ...rest] = process.argv.slice(2);
if (mode === 'net-server') netServer(first);
else if (mode === 'net-client') netClient(first, planOf(rest));
else if (mode === 'fork-client') forkClient(first, planOf(rest));
else if (mode === 'fork-server') forkServer();
else { console.error('unknown mode ' + mode); process.exit(2); }
