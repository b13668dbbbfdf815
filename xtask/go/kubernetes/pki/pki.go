// Package pki makes the certificates, keys and kubeconfig files of a cluster that lives for a day of tests.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

const validity = 365 * 24 * time.Hour

// Order is what is asked for, read as JSON.
type Order struct {
	// Folder to write to: ca.crt, ca.key, sa.key, sa.pub, and for each certificate NAME.crt and NAME.key.
	Folder string `json:"folder"`
	// Server is the address of the API server; with it, each client gets NAME.kubeconfig as well.
	Server string `json:"server"`
	// Certificates to issue.
	Certificates []Certificate `json:"certificates"`
}

// Certificate is one certificate for server and client authentication.
type Certificate struct {
	Name          string   `json:"name"`
	CommonName    string   `json:"common_name"`
	Organizations []string `json:"organizations"`
	// Hosts are DNS names and IP addresses.
	Hosts []string `json:"hosts"`
}

// Main reads an order from standard input and carries it out.
func Main() int {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "pki:", err)
		return 1
	}
	return 0
}

func run() error {
	var order Order
	if err := json.NewDecoder(os.Stdin).Decode(&order); err != nil {
		return fmt.Errorf("read the order: %w", err)
	}
	ca, err := newAuthority()
	if err != nil {
		return err
	}
	files := map[string][]byte{"ca.crt": certificatePEM(ca.certificate.Raw)}
	if files["ca.key"], err = keyPEM(ca.key); err != nil {
		return err
	}
	if err := addTokenKey(files); err != nil {
		return err
	}
	for _, wanted := range order.Certificates {
		if err := ca.issue(wanted, order.Server, files); err != nil {
			return fmt.Errorf("%s: %w", wanted.Name, err)
		}
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(order.Folder, name), content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

type authority struct {
	key         *ecdsa.PrivateKey
	certificate *x509.Certificate
}

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "test-cluster"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(validity),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &authority{key: key, certificate: certificate}, nil
}

func (ca *authority) issue(wanted Certificate, server string, files map[string][]byte) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: wanted.CommonName, Organization: wanted.Organizations},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(validity),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, host := range wanted.Hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.certificate, &key.PublicKey, ca.key)
	if err != nil {
		return err
	}
	private, err := keyPEM(key)
	if err != nil {
		return err
	}
	public := certificatePEM(der)
	files[wanted.Name+".crt"], files[wanted.Name+".key"] = public, private
	if server == "" {
		return nil
	}
	files[wanted.Name+".kubeconfig"], err = kubeconfig(server, files["ca.crt"], public, private)
	return err
}

// addTokenKey adds the key that signs tokens of service accounts.
func addTokenKey(files map[string][]byte) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if files["sa.key"], err = keyPEM(key); err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return err
	}
	files["sa.pub"] = pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
	return nil
}

func kubeconfig(server string, ca, certificate, key []byte) ([]byte, error) {
	type object map[string]any
	// A []byte becomes base64 in JSON, which is what these fields want.
	cluster := object{"server": server, "certificate-authority-data": ca}
	user := object{"client-certificate-data": certificate, "client-key-data": key}
	return json.MarshalIndent(object{
		"apiVersion":      "v1",
		"kind":            "Config",
		"clusters":        []object{{"name": "cluster", "cluster": cluster}},
		"users":           []object{{"name": "user", "user": user}},
		"contexts":        []object{{"name": "context", "context": object{"cluster": "cluster", "user": "user"}}},
		"current-context": "context",
	}, "", "  ")
}

func certificatePEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func keyPEM(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}
