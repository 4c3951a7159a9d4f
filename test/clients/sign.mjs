// Signs EIP-712 typed data (JSON on stdin) as a wallet does, with the key in
// PRIVATE_KEY. Prints the signature.
import { Wallet } from "ethers";
import { readFileSync } from "node:fs";

const { types, primaryType, domain, message } = JSON.parse(readFileSync(0, "utf8"));
const { EIP712Domain, ...own } = types;
if (Object.keys(own).join() !== primaryType) throw new Error(`types ${Object.keys(own)} for ${primaryType}`);
console.log(await new Wallet(process.env.PRIVATE_KEY).signTypedData(domain, own, message));
