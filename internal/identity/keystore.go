package identity

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"

	"github.com/ethereum/go-ethereum/accounts/keystore"

	"github.com/resultity/node/internal/evm"
)

// What opening a keystore file may cost, which the file itself says. Wallets ask for
// 256 MiB at most (n 262144, r 8, p 1), and for some seconds.
const (
	maxMemory     = 512 << 20 // bytes, of scrypt
	maxSteps      = 1 << 23   // n·r·p of scrypt: four times those of wallets
	maxIterations = 10 << 20  // of PBKDF2
)

// ParseKeystore decrypts an Ethereum keystore file of version 3. The file may be
// anybody's: one whose passphrase would cost too much memory or time to try is refused
// before that. The error wraps [keystore.ErrDecrypt] if the passphrase is wrong.
func ParseKeystore(raw []byte, pass string) (*evm.Key, error) {
	var file struct {
		Version int                 `json:"version"`
		Crypto  keystore.CryptoJSON `json:"crypto"`
	}
	if err := json.Unmarshal(raw, &file); err != nil {
		return nil, err
	}
	if file.Version != 3 {
		return nil, fmt.Errorf("it is of version %d, want 3", file.Version)
	}
	if err := checkCost(&file.Crypto); err != nil {
		return nil, err
	}
	plain, err := keystore.DecryptDataV3(file.Crypto, pass)
	if err != nil {
		return nil, err
	}
	return evm.ParseKey(hex.EncodeToString(plain))
}

// checkCost refuses what would cost too much, and what the library panics at.
func checkCost(c *keystore.CryptoJSON) error {
	if iv, err := hex.DecodeString(c.CipherParams.IV); err != nil || len(iv) != 16 {
		return errors.New("its cipherparams.iv is not 16 bytes in hexadecimal digits")
	}
	if _, ok := c.KDFParams["salt"].(string); !ok {
		return errors.New("its kdfparams.salt is no text")
	}
	var wrong error
	number := func(name string, least, most uint64) uint64 {
		f, ok := c.KDFParams[name].(float64)
		if !ok || f != math.Trunc(f) || f < float64(least) || f > float64(most) {
			if wrong == nil {
				wrong = fmt.Errorf("its kdfparams.%s is %.40v, want a number from %d to %d: more may take all the memory or hours; export the key from its wallet with the usual cost", name, c.KDFParams[name], least, most)
			}
			return least
		}
		return uint64(f)
	}
	number("dklen", 32, 64)
	switch c.KDF {
	case "scrypt":
		n, r, p := number("n", 2, 1<<22), number("r", 1, 1<<10), number("p", 1, 1<<10)
		if wrong == nil && (128*n*r > maxMemory || n*r*p > maxSteps) {
			wrong = fmt.Errorf("trying its passphrase takes %d MiB and %d steps (kdfparams n %d, r %d, p %d), at most %d MiB and %d are taken: export the key from its wallet with the usual cost, such as n 262144, r 8, p 1",
				128*n*r>>20, n*r*p, n, r, p, maxMemory>>20, maxSteps)
		}
	case "pbkdf2":
		number("c", 1, maxIterations)
		if _, ok := c.KDFParams["prf"].(string); !ok && wrong == nil {
			wrong = errors.New("its kdfparams.prf is no text")
		}
	default:
		return fmt.Errorf("its kdf is %.40q, want scrypt or pbkdf2", c.KDF)
	}
	return wrong
}
