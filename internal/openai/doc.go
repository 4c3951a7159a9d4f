// Package openai owns the two inference APIs of a node, chat completions and
// completions in OpenAI's form: what a request may say, what the engine is
// asked in its place, and the bytes that answer it. The network's gateway and
// the agent share it, so that what one lets in the other takes.
//
// The rule it keeps: nothing passes through. A request is an explicit list of
// parameters, each checked, and the engine sees only those; a response is
// written anew from the few fields of the engine's events that the API
// promises. It does no I/O and asks no clock.
//
// # Requests
//
// Everything that OpenAI's own client libraries send for a text conversation
// works. Engines ignore, or obey in their own way, what they were not made
// for, so a parameter that is not on the list is refused by name, with
// status 400:
//
//   - Sent on to the engine as it was written: messages or prompt, temperature,
//     top_p, stop, presence_penalty, frequency_penalty, logit_bias,
//     response_format. null means not given.
//   - Sent on in our words: model, stream, stream_options, seed, max_tokens and
//     max_completion_tokens.
//   - Taken and kept from the engine, which has no use for them: user,
//     safety_identifier, prompt_cache_key, metadata.
//   - Taken only with the value that asks for nothing: n, best_of, echo,
//     suffix, logprobs, top_logprobs, store, tool_choice, modalities,
//     service_tier.
//   - Refused: tools, functions, audio, images, files, lists of prompts,
//     token arrays, and whatever else there is.
//
// The role developer becomes system, which is what models are trained on.
// Seeds are folded into the 32 bits that all engines have, leaving out the one
// value that some take as a wish for randomness.
//
// # Control tokens
//
// Engines turn the text of a control token, such as <|im_end|>, into that
// token, also when it stands in a user's words: whoever can write a part of a
// message could end it and speak as the system or the assistant. A message of
// a chat that holds one is therefore refused, see [ControlToken]. The prompt
// of a completion is not looked at: its author writes all of the model's input
// and has no roles to be protected from.
//
// # Responses
//
// See [Assembler]. Two nodes whose engines produce the same tokens write the
// same bytes, provided that the engine makes an event of each token, as
// llama.cpp and Ollama do; vLLM may put several into one under load, so its
// plain answers are equal and its streams equal in content.
//
// [Compare] says whether two answers to one request are the same in all that the
// engine has computed, so that a request can be repeated and the answers held
// against one another.
package openai
