// Compiles a Solidity contract (source on stdin) of the name in CONTRACT. Prints
// {"abi": …, "code": "…"}. A warning is an error.
import solc from "solc";
import { readFileSync } from "node:fs";

const out = JSON.parse(
  solc.compile(
    JSON.stringify({
      language: "Solidity",
      sources: { "contract.sol": { content: readFileSync(0, "utf8") } },
      settings: {
        optimizer: { enabled: true, runs: 10000 },
        evmVersion: "cancun",
        outputSelection: { "*": { "*": ["abi", "evm.bytecode.object"] } },
      },
    }),
  ),
);
if (out.errors?.length) throw new Error(out.errors.map((e) => e.formattedMessage).join("\n"));
const { abi, evm } = out.contracts["contract.sol"][process.env.CONTRACT];
console.log(JSON.stringify({ abi, code: evm.bytecode.object }));
