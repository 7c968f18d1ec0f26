package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"time"
)

// authority signs the kubelets' certificates.
type authority struct {
	pem         []byte
	certificate *x509.Certificate
	key         crypto.Signer
	serial      int64
}

func readAuthority(certificate, key string) (*authority, error) {
	pair, err := tls.LoadX509KeyPair(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("the authority: %w", err)
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s: a %T cannot sign", key, pair.PrivateKey)
	}
	text, err := os.ReadFile(certificate)
	if err != nil {
		return nil, err
	}
	return &authority{pem: text, certificate: pair.Leaf, key: signer, serial: time.Now().UnixNano()}, nil
}

// sign makes a client's certificate and key, in PEM.
func (a *authority) sign(user, group string) (certificate, key []byte, err error) {
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	a.serial++
	now := time.Now()
	wanted := &x509.Certificate{
		SerialNumber: big.NewInt(a.serial),
		Subject:      pkix.Name{CommonName: user, Organization: []string{group}},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	signed, err := x509.CreateCertificate(rand.Reader, wanted, a.certificate, &own.PublicKey, a.key)
	if err != nil {
		return nil, nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(own)
	if err != nil {
		return nil, nil, err
	}
	block := func(kind string, octets []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: octets})
	}
	return block("CERTIFICATE", signed), block("PRIVATE KEY", private), nil
}
