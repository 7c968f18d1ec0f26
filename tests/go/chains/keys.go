package main

// Keys that come from their names, so that every run makes the same ones, and signatures with any of them in any way.

import (
	"crypto/dsa" //nolint:staticcheck // refused ones are wanted too
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"hash"
	"math/big"
)

type key struct {
	rsaN, rsaD *big.Int
	ec         *ecdsa.PrivateKey
	ed         ed25519.PrivateKey
	dsa        *dsa.PrivateKey
	spki       []byte
}

// stream is an endless row of octets that depends on its name alone.
type stream struct {
	state [32]byte
	left  []byte
}

func newStream(name string) *stream { return &stream{state: sha256.Sum256([]byte(name))} }

func (s *stream) Read(p []byte) (int, error) {
	for i := range p {
		if len(s.left) == 0 {
			s.state = sha256.Sum256(s.state[:])
			mixed := sha256.Sum256(append([]byte("out"), s.state[:]...))
			s.left = mixed[:]
		}
		p[i], s.left = s.left[0], s.left[1:]
	}
	return len(p), nil
}

func (s *stream) below(n int) int {
	var b [4]byte
	s.Read(b[:])
	return int(uint32(b[0])<<24|uint32(b[1])<<16|uint32(b[2])<<8|uint32(b[3])) % n
}

func prime(s *stream, size int, e *big.Int) *big.Int {
	b := make([]byte, (size+7)/8)
	for {
		s.Read(b)
		p := new(big.Int).SetBytes(b)
		p.Rsh(p, uint(len(b)*8-size))
		p.SetBit(p, size-1, 1)
		p.SetBit(p, size-2, 1)
		p.SetBit(p, 0, 1)
		minus := new(big.Int).Sub(p, big.NewInt(1))
		if new(big.Int).GCD(nil, nil, minus, e).Cmp(big.NewInt(1)) == 0 && p.ProbablyPrime(10) {
			return p
		}
	}
}

var keys = map[string]*key{}

func rsaKey(name string, size int, e int64) *key {
	if k := keys[name]; k != nil {
		return k
	}
	s := newStream(name)
	E := big.NewInt(e)
	fit := E
	if e%2 == 0 {
		fit = big.NewInt(e + 1) // no such key exists: the signature is good for another exponent
	}
	return rsaOf(name, prime(s, (size+1)/2, fit), prime(s, size-(size+1)/2, fit), E, fit)
}

// longRSAKey is longer than TLS takes; its primes are Mersenne's, which need no search.
func longRSAKey() *key {
	mersenne := func(n uint) *big.Int {
		return new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), n), big.NewInt(1))
	}
	e := big.NewInt(65537)
	return rsaOf("rsa-long", mersenne(4423), mersenne(4253), e, e)
}

func rsaOf(name string, p, q, E, fit *big.Int) *key {
	one := big.NewInt(1)
	phi := new(big.Int).Mul(new(big.Int).Sub(p, one), new(big.Int).Sub(q, one))
	k := &key{rsaN: new(big.Int).Mul(p, q), rsaD: new(big.Int).ModInverse(fit, phi)}
	k.spki = seq(seq(oid("1.2.840.113549.1.1.1"), null()), bits(seq(integer(k.rsaN), integer(E))))
	keys[name] = k
	return k
}

var curveOID = map[elliptic.Curve]string{
	elliptic.P224(): "1.3.132.0.33",
	elliptic.P256(): "1.2.840.10045.3.1.7",
	elliptic.P384(): "1.3.132.0.34",
	elliptic.P521(): "1.3.132.0.35",
}

func ecKey(name string, curve elliptic.Curve) *key {
	if k := keys[name]; k != nil {
		return k
	}
	b := make([]byte, (curve.Params().BitSize+7)/8)
	newStream(name).Read(b[1:])
	priv, err := ecdsa.ParseRawPrivateKey(curve, b)
	if err != nil {
		panic(err)
	}
	point, err := priv.PublicKey.Bytes()
	if err != nil {
		panic(err)
	}
	k := &key{ec: priv, spki: ecSPKI(curveOID[curve], point)}
	keys[name] = k
	return k
}

func ecSPKI(curve string, point []byte) []byte {
	return seq(seq(oid("1.2.840.10045.2.1"), oid(curve)), bits(point))
}

func edKey(name string) *key {
	if k := keys[name]; k != nil {
		return k
	}
	seed := sha256.Sum256([]byte(name))
	priv := ed25519.NewKeyFromSeed(seed[:])
	k := &key{ed: priv, spki: seq(seq(oid("1.3.101.112")), bits(priv.Public().(ed25519.PublicKey)))}
	keys[name] = k
	return k
}

func xKey(name string) *key {
	seed := sha256.Sum256([]byte(name))
	priv, err := ecdh.X25519().NewPrivateKey(seed[:])
	if err != nil {
		panic(err)
	}
	return &key{spki: seq(seq(oid("1.3.101.110")), bits(priv.PublicKey().Bytes()))}
}

func dsaKey(name string) *key {
	if k := keys[name]; k != nil {
		return k
	}
	priv := new(dsa.PrivateKey)
	if err := dsa.GenerateParameters(&priv.Parameters, rand.Reader, dsa.L1024N160); err != nil {
		panic(err)
	}
	if err := dsa.GenerateKey(priv, rand.Reader); err != nil {
		panic(err)
	}
	k := &key{dsa: priv, spki: seq(
		seq(oid("1.2.840.10040.4.1"), seq(integer(priv.P), integer(priv.Q), integer(priv.G))), bits(integer(priv.Y)))}
	keys[name] = k
	return k
}

// algorithm is a way of signing: its identifier, and what it does.
type algorithm struct {
	identifier []byte
	hash       func() hash.Hash
	prefix     []byte // of PKCS #1's DigestInfo
	salt       int    // of PSS, or -1
	mgf        func() hash.Hash
}

var (
	infoMD5    = []byte{0x30, 0x20, 0x30, 0x0c, 6, 8, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 2, 5, 5, 0, 4, 0x10}
	infoSHA1   = []byte{0x30, 0x21, 0x30, 9, 6, 5, 0x2b, 0x0e, 3, 2, 0x1a, 5, 0, 4, 0x14}
	infoSHA224 = []byte{0x30, 0x2d, 0x30, 0x0d, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 4, 5, 0, 4, 0x1c}
	infoSHA256 = []byte{0x30, 0x31, 0x30, 0x0d, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1, 5, 0, 4, 0x20}
	infoSHA384 = []byte{0x30, 0x41, 0x30, 0x0d, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 2, 5, 0, 4, 0x30}
	infoSHA512 = []byte{0x30, 0x51, 0x30, 0x0d, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 3, 5, 0, 4, 0x40}
)

func pkcs1(id string, h func() hash.Hash, info []byte) algorithm {
	return algorithm{identifier: seq(oid(id), null()), hash: h, prefix: info, salt: -1}
}

func plain(id string, h func() hash.Hash) algorithm {
	return algorithm{identifier: seq(oid(id)), hash: h, salt: -1}
}

const (
	idSHA256 = "2.16.840.1.101.3.4.2.1"
	idSHA384 = "2.16.840.1.101.3.4.2.2"
	idSHA512 = "2.16.840.1.101.3.4.2.3"
)

func pss(id string, h func() hash.Hash, mgfID string, mgf func() hash.Hash, salt int, more ...[]byte) algorithm {
	params := cat(
		el(0xa0, seq(oid(id), null())),
		el(0xa1, seq(oid("1.2.840.113549.1.1.8"), seq(oid(mgfID), null()))),
		el(0xa2, num(int64(salt))),
		cat(more...))
	return algorithm{identifier: seq(oid("1.2.840.113549.1.1.10"), seq(params)), hash: h, salt: salt, mgf: mgf}
}

var algorithms = map[string]algorithm{
	"md5-rsa":      pkcs1("1.2.840.113549.1.1.4", md5.New, infoMD5),
	"sha1-rsa":     pkcs1("1.2.840.113549.1.1.5", sha1.New, infoSHA1),
	"sha1-rsa-iso": pkcs1("1.3.14.3.2.29", sha1.New, infoSHA1),
	"sha224-rsa":   pkcs1("1.2.840.113549.1.1.14", sha256.New224, infoSHA224),
	"sha256-rsa":   pkcs1("1.2.840.113549.1.1.11", sha256.New, infoSHA256),
	"sha384-rsa":   pkcs1("1.2.840.113549.1.1.12", sha512.New384, infoSHA384),
	"sha512-rsa":   pkcs1("1.2.840.113549.1.1.13", sha512.New, infoSHA512),
	"sha256-rsa-without-null": {identifier: seq(oid("1.2.840.113549.1.1.11")), hash: sha256.New,
		prefix: infoSHA256, salt: -1},
	"sha256-pss":             pss(idSHA256, sha256.New, idSHA256, sha256.New, 32),
	"sha384-pss":             pss(idSHA384, sha512.New384, idSHA384, sha512.New384, 48),
	"sha512-pss":             pss(idSHA512, sha512.New, idSHA512, sha512.New, 64),
	"sha256-pss-salt-20":     pss(idSHA256, sha256.New, idSHA256, sha256.New, 20),
	"sha256-pss-mgf-384":     pss(idSHA256, sha256.New, idSHA384, sha512.New384, 32),
	"sha256-pss-trailer-1":   pss(idSHA256, sha256.New, idSHA256, sha256.New, 32, el(0xa3, num(1))),
	"sha256-pss-trailer-2":   pss(idSHA256, sha256.New, idSHA256, sha256.New, 32, el(0xa3, num(2))),
	"sha1-pss-default":       {identifier: seq(oid("1.2.840.113549.1.1.10"), seq()), hash: sha1.New, salt: 20, mgf: sha1.New},
	"ecdsa-sha1":             plain("1.2.840.10045.4.1", sha1.New),
	"ecdsa-sha224":           plain("1.2.840.10045.4.3.1", sha256.New224),
	"ecdsa-sha256":           plain("1.2.840.10045.4.3.2", sha256.New),
	"ecdsa-sha384":           plain("1.2.840.10045.4.3.3", sha512.New384),
	"ecdsa-sha512":           plain("1.2.840.10045.4.3.4", sha512.New),
	"ecdsa-sha256-with-null": {identifier: seq(oid("1.2.840.10045.4.3.2"), null()), hash: sha256.New, salt: -1},
	"ed25519":                plain("1.3.101.112", nil),
	"ed25519-with-null":      {identifier: seq(oid("1.3.101.112"), null()), salt: -1},
	"dsa-sha1":               plain("1.2.840.10040.4.3", sha1.New),
	"dsa-sha256":             plain("2.16.840.1.101.3.4.3.2", sha256.New),
	"unknown":                plain("1.2.3.4.5", sha256.New),
}

func (k *key) sign(a algorithm, message []byte) []byte {
	if k.ed != nil {
		return ed25519.Sign(k.ed, message)
	}
	if a.hash == nil {
		return []byte("no signature")
	}
	h := a.hash()
	h.Write(message)
	digest := h.Sum(nil)
	switch {
	case k.ec != nil:
		sig, err := ecdsa.SignASN1(rand.Reader, k.ec, digest)
		if err != nil {
			panic(err)
		}
		return sig
	case k.dsa != nil:
		if len(digest) > 20 {
			digest = digest[:20]
		}
		r, s, err := dsa.Sign(rand.Reader, k.dsa, digest)
		if err != nil {
			panic(err)
		}
		return seq(integer(r), integer(s))
	case k.rsaN == nil:
		return []byte("no signature")
	}
	size := (k.rsaN.BitLen() + 7) / 8
	var block []byte
	if a.salt >= 0 {
		block = encodePSS(a, digest, k.rsaN.BitLen()-1)
	} else {
		tail := cat([]byte{0}, a.prefix, digest)
		if size < len(tail)+11 {
			return make([]byte, size)
		}
		block = []byte{0, 1}
		for len(block) < size-len(tail) {
			block = append(block, 0xff)
		}
		block = append(block, tail...)
	}
	if block == nil {
		return make([]byte, size)
	}
	n := new(big.Int).Exp(new(big.Int).SetBytes(block), k.rsaD, k.rsaN)
	return n.FillBytes(make([]byte, size))
}

// encodePSS is RFC 8017, section 9.1.1.
func encodePSS(a algorithm, digest []byte, bits int) []byte {
	size := (bits + 7) / 8
	if size < len(digest)+a.salt+2 {
		return nil
	}
	salt := make([]byte, a.salt)
	newStream("salt").Read(salt)
	h := a.hash()
	h.Write(make([]byte, 8))
	h.Write(digest)
	h.Write(salt)
	H := h.Sum(nil)
	db := make([]byte, size-len(H)-1)
	db[len(db)-len(salt)-1] = 1
	copy(db[len(db)-len(salt):], salt)
	var mask []byte
	for i := 0; len(mask) < len(db); i++ {
		g := a.mgf()
		g.Write(H)
		g.Write([]byte{byte(i >> 24), byte(i >> 16), byte(i >> 8), byte(i)})
		mask = g.Sum(mask)
	}
	for i := range db {
		db[i] ^= mask[i]
	}
	db[0] &= 0xff >> (8*size - bits)
	return cat(db, H, []byte{0xbc})
}
