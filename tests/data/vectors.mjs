// Writes requests.jsonl and numbers.jsonl: what JSON.stringify makes of requests and numbers made up here.
// Usage: node tests/data/vectors.mjs; the tests need the files only. The same seed gives the same files.
import { writeFileSync } from 'node:fs';

let state = 0x9e3779b9;
function random() {
    // mulberry32
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
}
const below = (n) => Math.floor(random() * n);
const pick = (list) => list[below(list.length)];
const maybe = (make) => (random() < 0.5 ? make() : undefined);
const many = (max, make) => Array.from({ length: below(max + 1) }, make);

const view = new DataView(new ArrayBuffer(8));
function fromBits(bits) {
    view.setBigUint64(0, bits);
    return view.getFloat64(0);
}
function anyBits() {
    return (BigInt(below(2 ** 32)) << 32n) | BigInt(below(2 ** 32));
}

const NUMBERS = [
    0, -0, 1, -1, 0.1, 0.2, 0.1 + 0.2, 1 / 3, 1e-6, 1e-7, 1.5e-7, 9.99e-7, 1e20, 1e21, 1e22, 123456789012345680000,
    1.2345678901234568e21, 999999999999999900000, 5e-324, 2.2250738585072014e-308, 2.225073858507201e-308,
    Number.MAX_VALUE, -Number.MAX_VALUE, Number.MAX_SAFE_INTEGER, Number.MIN_SAFE_INTEGER, Number.EPSILON, 2 ** 53,
    2 ** 53 + 2, 2 ** 63, 2 ** 64, 4294967295, 4294967296, 0.1234567891, 100, 1e100, 1e-100, NaN, Infinity, -Infinity,
    9007199254740993, 0.000001, 0.0000012, 1.7976931348623155e308, 4.35, 0.000035, 1e5, 1e15, 1e16, 1e17, 12e17,
];
function number() {
    switch (below(5)) {
        case 0: return pick(NUMBERS);
        case 1: return below(100000);
        case 2: return Math.round(random() * 2000) / 1000;
        case 3: return (random() - 0.5) * 10 ** (below(50) - 25);
        default: return fromBits(anyBits());
    }
}

const PIECES = [
    'hello ', 'fn main() {\n\tprintln!("hi");\n}\r\n', '\\', '"', '/', '</script>', '\b\f\v', '\u007f', '\u0080', '\u00a0',
    '\u2028\u2029', '\ufeff', '\ufffd', '\uffff', '\ud7ff\ue000', '😀', '👨‍👩‍👧', '漢字', 'é', 'e\u0301', '\u{10ffff}', '\u{10000}', "'`",
    '<&>', '\\u0041', '%s%n', '${x}', '__proto__', '\u0000', 'x'.repeat(40),
];
function text() {
    const control = () => String.fromCharCode(below(0x20));
    const any = () => {
        const point = below(0x110000);
        return point >= 0xd800 && point < 0xe000 ? 'q' : String.fromCodePoint(point);
    };
    return many(8, () => pick([() => pick(PIECES), control, any, () => 'word '])()).join('');
}
const lone = () => text() + pick(['\ud800', '\udbff', '\udc00', '\udfff', '\udc00\ud800', '\ud83d\ud83d\ude00']);

function json(depth) {
    switch (below(depth > 0 ? 9 : 6)) {
        case 0: return null;
        case 1: return random() < 0.5;
        case 2: return number();
        case 3: return text();
        case 4: return lone();
        case 5: return undefined;
        case 6: return many(4, () => json(depth - 1));
        default: {
            const object = {};
            for (let i = below(5); i > 0; i--) {
                object[pick([text, lone, () => String(below(30)), () => pick(PIECES)])()] = json(depth - 1);
            }
            return object;
        }
    }
}
function nested(depth) {
    let value = 0;
    for (let i = 0; i < depth; i++) value = i % 2 ? { a: value } : [value];
    return value;
}

// In the order of the interfaces' declarations.
const call = () => ({ name: text(), parameters: json(4), id: text() });
const message = () => ({
    role: pick(['system', 'user', 'assistant']),
    content: text(),
    toolCalls: maybe(() => many(3, call)),
});
const tool = () => ({ name: text(), description: maybe(text), parameters: json(4) });
const request = () => ({
    messages: many(4, message),
    model: text(),
    temperature: maybe(number),
    maxTokens: maybe(number),
    tools: maybe(() => many(3, tool)),
    systemPrompt: maybe(text),
    stream: maybe(() => random() < 0.5),
});

const requests = Array.from({ length: 250 }, request);
for (const temperature of NUMBERS) requests.push({ messages: [], model: 'm', temperature, maxTokens: -temperature });
for (const depth of [1, 10, 127, 128, 129, 500, 1000]) {
    requests.push({ messages: [], model: 'm', tools: [{ name: 'deep', parameters: nested(depth) }] });
}
const all = Array.from({ length: 0x300 }, (_, i) => String.fromCharCode(i)).join('');
requests.push({ messages: [{ role: 'user', content: all }], model: all });

const numbers = [...NUMBERS];
while (numbers.length < 1500) numbers.push(number());
const line = (n) => {
    view.setFloat64(0, n);
    return JSON.stringify([view.getBigUint64(0).toString(16).padStart(16, '0'), JSON.stringify(n)]);
};
const here = (name) => new URL(name, import.meta.url);
writeFileSync(here('requests.jsonl'), requests.map((r) => JSON.stringify(r) + '\n').join(''));
writeFileSync(here('numbers.jsonl'), numbers.map((n) => line(n) + '\n').join(''));
