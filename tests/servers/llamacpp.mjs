// llama.cpp as a process: one base, one context per adapter; greedy tokens from token ids.
//
// node llamacpp.mjs node-llama-cpp/dist/index.js < {"base": gguf, "requests": [{"adapter": gguf or null, "prompt": [ids], "tokens": n}]}
// On stdout, per request: {"tokens": [ids], "logprobs": [each token's]}.
import {pathToFileURL} from "node:url";

const {getLlama, LlamaLogLevel} = await import(pathToFileURL(process.argv[2]).href);
let text = "";
for await (const chunk of process.stdin) text += chunk;
const {base, requests} = JSON.parse(text);

// build "never": neither a compiler nor a download if the prebuilt library does not fit.
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, maxThreads: 1, logLevel: LlamaLogLevel.warn});
const model = await llama.loadModel({modelPath: base});
const sequences = new Map();

async function sequenceOf(adapter) {
  if (!sequences.has(adapter)) {
    const context = await model.createContext({
      contextSize: 256, flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
      lora: adapter ? {adapters: [{filePath: adapter}]} : undefined,
    });
    sequences.set(adapter, context.getSequence());
  }
  const sequence = sequences.get(adapter);
  await sequence.clearHistory();
  return sequence;
}

const logSumExp = (values) => {
  const most = values.reduce((a, b) => Math.max(a, b));
  return most + Math.log(values.reduce((sum, value) => sum + Math.exp(value - most), 0));
};

const answers = [];
for (const {adapter, prompt, tokens} of requests) {
  const sequence = await sequenceOf(adapter);
  const answer = {tokens: [], logprobs: []};
  let read = prompt;
  while (answer.tokens.length < tokens) {
    const last = [read.at(-1), {generateNext: {token: true, logits: true, options: {temperature: 0}}}];
    const {next} = (await sequence.controlledEvaluate([...read.slice(0, -1), last])).at(-1);
    answer.tokens.push(next.token);
    answer.logprobs.push(next.logits.get(next.token) - logSumExp([...next.logits.values()]));
    read = [next.token];
  }
  answers.push(answer);
}
console.log(JSON.stringify(answers));
process.exit(0);
