// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

/// @title What Resultity nodes have signed, checked and recorded on a chain
/// @notice Anybody may record anybody's statements: only their signatures count.
/// A network's receipts are for the chain whose id its configuration names, so
/// one made for another chain is refused here.
contract ResultityReceipts {
    /// What a node states about one result.
    struct Receipt {
        bytes16 job;
        address node;
        Measured measured;
        Claimed claimed;
        uint64 sequence;
    }

    /// What the node's agent has hashed or verified itself. Whoever has the request
    /// and the response can check their hashes.
    struct Measured {
        bytes32 configDigest;
        bytes32 imageDigest;
        bytes32 modelDigest;
        bytes32 sandboxDigest;
        bytes32 requestHash;
        bytes32 responseHash;
    }

    /// What the engine, the hardware or the node's clock say. Nobody can check it.
    struct Claimed {
        bytes32 classDigest;
        uint64 promptTokens;
        uint64 completionTokens;
        uint64 startedAt;
        uint64 finishedAt;
    }

    /// The log of a node's receipts in one network at one time: one root for any
    /// number of them. The network is the Keccak-256 of its name. The era is 0 until
    /// the network's operator has the log begin anew: each is a log of its own, and that
    /// the network has begun it is not checked here.
    struct Head {
        address node;
        bytes32 network;
        uint64 era;
        uint64 size;
        bytes32 root;
        uint64 time;
    }

    event ReceiptRecorded(address indexed node, bytes16 indexed job, bytes32 digest);
    event HeadRecorded(address indexed node, bytes32 indexed network, uint64 indexed era, uint64 size, bytes32 root);
    /// One key has signed two receipts with one sequence, or two logs of one size.
    event Contradiction(address indexed node, uint64 indexed number, bytes32 first, bytes32 second);

    /// The signature is malformed, or not by the statement's node.
    error BadSignature();
    error AlreadyRecorded();
    /// A larger log of the node is recorded.
    error Outdated(uint64 size);

    bytes32 private constant DOMAIN_TYPE = keccak256("EIP712Domain(string name,string version,uint256 chainId)");
    bytes32 private constant RECEIPT_TYPE = keccak256(
        "Receipt(bytes16 job,address node,Measured measured,Claimed claimed,uint64 sequence)"
        "Claimed(bytes32 classDigest,uint64 promptTokens,uint64 completionTokens,uint64 startedAt,uint64 finishedAt)"
        "Measured(bytes32 configDigest,bytes32 imageDigest,bytes32 modelDigest,bytes32 sandboxDigest,"
        "bytes32 requestHash,bytes32 responseHash)"
    );
    bytes32 private constant MEASURED_TYPE = keccak256(
        "Measured(bytes32 configDigest,bytes32 imageDigest,bytes32 modelDigest,bytes32 sandboxDigest,"
        "bytes32 requestHash,bytes32 responseHash)"
    );
    bytes32 private constant CLAIMED_TYPE = keccak256(
        "Claimed(bytes32 classDigest,uint64 promptTokens,uint64 completionTokens,uint64 startedAt,uint64 finishedAt)"
    );
    bytes32 private constant HEAD_TYPE = keccak256("ReceiptLogHead(address node,string network,uint64 era,uint64 size,bytes32 root,uint64 time)");

    /// The upper half of the curve's order is refused (EIP-2): a statement has one
    /// signature, not two.
    uint256 private constant HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0;

    /// The receipts that are recorded: node, sequence, digest.
    mapping(address => mapping(uint64 => bytes32)) public receipts;
    /// The largest log of each node in each network that is recorded, by era.
    mapping(address => mapping(bytes32 => mapping(uint64 => Head))) public heads;

    /// @return digest The EIP-712 hash of the receipt.
    /// @dev Members of the inner structs are one word long, so that their ABI encoding
    /// is EIP-712's.
    function check(Receipt calldata r, bytes calldata signature) public view returns (bytes32 digest) {
        bytes32 measured = keccak256(abi.encode(MEASURED_TYPE, r.measured));
        bytes32 claimed = keccak256(abi.encode(CLAIMED_TYPE, r.claimed));
        digest = _typed(keccak256(abi.encode(RECEIPT_TYPE, r.job, r.node, measured, claimed, r.sequence)));
        _signedBy(r.node, digest, signature);
    }

    /// @return digest The EIP-712 hash of the head.
    /// @dev A string is its Keccak-256 there, which is what network holds.
    function checkHead(Head calldata h, bytes calldata signature) public view returns (bytes32 digest) {
        digest = _typed(keccak256(abi.encode(HEAD_TYPE, h)));
        _signedBy(h.node, digest, signature);
    }

    /// Records a receipt. A second one with its sequence is a contradiction.
    function record(Receipt calldata r, bytes calldata signature) external {
        bytes32 digest = check(r, signature);
        bytes32 before = receipts[r.node][r.sequence];
        if (before == digest) revert AlreadyRecorded();
        if (before != 0) {
            emit Contradiction(r.node, r.sequence, before, digest);
            return;
        }
        receipts[r.node][r.sequence] = digest;
        emit ReceiptRecorded(r.node, r.job, digest);
    }

    /// Records the log of a node as it is at a size, and thereby all its receipts.
    /// That it begins with the log recorded before is not checked here; whoever
    /// has the receipts can.
    function recordHead(Head calldata h, bytes calldata signature) external {
        checkHead(h, signature);
        Head storage before = heads[h.node][h.network][h.era];
        if (h.size < before.size) revert Outdated(before.size);
        if (h.size == before.size && before.node != address(0)) {
            if (h.root == before.root) revert AlreadyRecorded();
            emit Contradiction(h.node, h.size, before.root, h.root);
            return;
        }
        heads[h.node][h.network][h.era] = h;
        emit HeadRecorded(h.node, h.network, h.era, h.size, h.root);
    }

    /// Whether a receipt, given by its digest, is in the recorded log of a node:
    /// RFC 9162, section 2.1.3.2, with Keccak-256.
    function included(address node, bytes32 network, uint64 era, bytes32 digest, uint64 index, bytes32[] calldata path)
        external
        view
        returns (bool)
    {
        Head storage h = heads[node][network][era];
        if (index >= h.size) return false;
        uint64 place = index;
        uint64 last = h.size - 1;
        bytes32 hash = keccak256(abi.encodePacked(bytes1(0), digest));
        for (uint256 i = 0; i < path.length; i++) {
            if (last == 0) return false;
            if (place & 1 == 1 || place == last) {
                hash = keccak256(abi.encodePacked(bytes1(0x01), path[i], hash));
                while (place & 1 == 0 && place != 0) {
                    place >>= 1;
                    last >>= 1;
                }
            } else {
                hash = keccak256(abi.encodePacked(bytes1(0x01), hash, path[i]));
            }
            place >>= 1;
            last >>= 1;
        }
        return last == 0 && hash == h.root;
    }

    function _typed(bytes32 structHash) private view returns (bytes32) {
        bytes32 domain = keccak256(abi.encode(DOMAIN_TYPE, keccak256("Resultity"), keccak256("1"), block.chainid));
        return keccak256(abi.encodePacked(hex"1901", domain, structHash));
    }

    function _signedBy(address node, bytes32 digest, bytes calldata signature) private pure {
        if (signature.length != 65) revert BadSignature();
        bytes32 r = bytes32(signature[:32]);
        bytes32 s = bytes32(signature[32:64]);
        if (uint256(s) > HALF_ORDER) revert BadSignature();
        address by = ecrecover(digest, uint8(signature[64]), r, s);
        if (by == address(0) || by != node) revert BadSignature();
    }
}
