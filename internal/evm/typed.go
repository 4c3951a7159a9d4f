package evm

import (
	"encoding/binary"
	"strings"
)

// DomainName and DomainVersion begin the EIP-712 domain of all that is signed
// here; the chain's id completes it.
const (
	DomainName    = "Resultity"
	DomainVersion = "1"
)

// Field is a member of an EIP-712 struct type.
type Field struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

// DomainFields returns the members of the domain.
func DomainFields() []Field {
	return []Field{{"name", "string"}, {"version", "string"}, {"chainId", "uint256"}}
}

var (
	domainTypeHash = TypeHash("EIP712Domain", DomainFields())
	nameHash       = Keccak([]byte(DomainName))
	versionHash    = Keccak([]byte(DomainVersion))
)

// EncodeType is EIP-712's encodeType of a struct, but for the structs in it.
func EncodeType(name string, fields []Field) string {
	members := make([]string, len(fields))
	for i, f := range fields {
		members[i] = f.Type + " " + f.Name
	}
	return name + "(" + strings.Join(members, ",") + ")"
}

// TypeHash is EIP-712's typeHash of a struct. inner are the encoded types of the
// structs in it, sorted by name.
func TypeHash(name string, fields []Field, inner ...string) Hash {
	return Keccak([]byte(EncodeType(name, fields) + strings.Join(inner, "")))
}

// StructHash is EIP-712's hashStruct. Each member is its encoded 32 bytes, which
// for a struct are its StructHash.
func StructHash(typeHash Hash, members ...[]byte) Hash {
	b := make([]byte, 0, 32*(1+len(members)))
	b = append(b, typeHash[:]...)
	for _, m := range members {
		b = append(b, m...) // copied, so that callers can have it on their stack
	}
	return Keccak(b)
}

// TypedHash is the EIP-712 hash that wallets sign: that of a struct in our
// domain. For members see [StructHash].
func TypedHash(chainID uint64, typeHash Hash, members ...[]byte) Hash {
	separator := Keccak(domainTypeHash[:], nameHash[:], versionHash[:], Word(chainID))
	message := StructHash(typeHash, members...)
	return Keccak([]byte{0x19, 0x01}, separator[:], message[:])
}

// Word encodes a number in 32 bytes.
func Word(v uint64) []byte {
	var w [32]byte
	binary.BigEndian.PutUint64(w[24:], v)
	return w[:]
}

// AddressWord encodes an address in 32 bytes.
func AddressWord(a Address) []byte {
	var w [32]byte
	copy(w[12:], a[:])
	return w[:]
}
