package record

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"hash"
)

const (
	// MaxPlaintext is the most that one record carries (https://www.rfc-editor.org/rfc/rfc8446#section-5.1).
	MaxPlaintext = 1 << 14
	// HeaderLen precedes, and Overhead counts all that surrounds the plaintext: header, inner content type and tag.
	HeaderLen = 5
	Overhead  = HeaderLen + 1 + tagLen
	// MaxRecord is the longest record that peers may send (https://www.rfc-editor.org/rfc/rfc8446#section-5.2).
	MaxRecord = HeaderLen + MaxPlaintext + 256

	tagLen   = 16
	nonceLen = 12
)

// suite is what a cipher suite's name stands for.
type suite struct {
	keyLen int
	hash   func() hash.Hash
}

var suites = map[uint16]suite{
	tls.TLS_AES_128_GCM_SHA256: {16, sha256.New},
	tls.TLS_AES_256_GCM_SHA384: {32, sha512.New384},
}

// keys are one direction's traffic secret and what follows from it.
type keys struct {
	suite  suite
	secret []byte
	aead   cipher.AEAD
	iv     [nonceLen]byte
	seq    uint64 // of the next record under this key
	nonce  [nonceLen]byte

	watch func(cipher.AEAD) cipher.AEAD // tests see every key's use
}

// install derives key and IV (https://www.rfc-editor.org/rfc/rfc8446#section-7.3) and takes ownership of secret.
func (k *keys) install(s suite, secret []byte) error {
	key, err := expandLabel(s, secret, "key", s.keyLen)
	if err != nil {
		return err
	}
	defer clear(key)
	iv, err := expandLabel(s, secret, "iv", nonceLen)
	if err != nil {
		return err
	}
	defer clear(iv)
	block, err := aes.NewCipher(key)
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	if k.watch != nil {
		aead = k.watch(aead)
	}
	clear(k.secret)
	k.suite, k.secret, k.aead, k.seq = s, secret, aead, 0
	copy(k.iv[:], iv)
	return nil
}

// update moves on to the next generation (https://www.rfc-editor.org/rfc/rfc8446#section-7.2).
func (k *keys) update() error {
	next, err := expandLabel(k.suite, k.secret, "traffic upd", k.suite.hash().Size())
	if err != nil {
		return err
	}
	return k.install(k.suite, next)
}

// wipe forgets everything; the direction is over.
func (k *keys) wipe() {
	clear(k.secret)
	clear(k.iv[:])
	k.secret, k.aead = nil, nil
}

// next returns the nonce of the next record, which counts as used from here on, whatever becomes of it
// (https://www.rfc-editor.org/rfc/rfc8446#section-5.3).
func (k *keys) next() []byte {
	k.nonce = k.iv
	tail := k.nonce[nonceLen-8:]
	binary.BigEndian.PutUint64(tail, binary.BigEndian.Uint64(tail)^k.seq)
	k.seq++
	return k.nonce[:]
}

// expandLabel is HKDF-Expand-Label with an empty context (https://www.rfc-editor.org/rfc/rfc8446#section-7.1).
func expandLabel(s suite, secret []byte, label string, n int) ([]byte, error) {
	const prefix = "tls13 "
	info := binary.BigEndian.AppendUint16(nil, uint16(n))
	info = append(info, byte(len(prefix)+len(label)))
	info = append(info, prefix...)
	info = append(info, label...)
	info = append(info, 0)
	out, err := hkdf.Expand(s.hash, secret, string(info), n)
	if err != nil {
		return nil, fmt.Errorf("record: derive %s: %w", label, err)
	}
	return out, nil
}
