// Heads has Go's own net/http server judge heads of HTTP/1.1 requests: octets on stdin, each head with its length in four
// octets before it, and one line of JSON on stdout for each.
package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"time"
)

// verdict is what the server made of one head.
type verdict struct {
	Served bool                `json:"served"`
	Method string              `json:"method"`
	Target string              `json:"target"`
	Host   string              `json:"host"`
	Minor  int                 `json:"minor"`
	Fields map[string][]string `json:"fields"`
	Length int64               `json:"length"`
	Coding []string            `json:"coding"`
}

// conn is a connection on which a head came and then its end.
type conn struct {
	came   []byte
	answer []byte
	closed chan struct{}
}

func (c *conn) Read(into []byte) (int, error) {
	if len(c.came) == 0 {
		return 0, io.EOF
	}
	count := copy(into, c.came)
	c.came = c.came[count:]
	return count, nil
}

func (c *conn) Write(octets []byte) (int, error) {
	c.answer = append(c.answer, octets...)
	return len(octets), nil
}

func (c *conn) Close() error {
	select {
	case <-c.closed:
	default:
		close(c.closed)
	}
	return nil
}

func (c *conn) LocalAddr() net.Addr              { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }
func (c *conn) RemoteAddr() net.Addr             { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }
func (c *conn) SetDeadline(time.Time) error      { return nil }
func (c *conn) SetReadDeadline(time.Time) error  { return nil }
func (c *conn) SetWriteDeadline(time.Time) error { return nil }

type listener chan net.Conn

func (l listener) Accept() (net.Conn, error) { return <-l, nil }
func (l listener) Close() error              { return nil }
func (l listener) Addr() net.Addr            { return &net.TCPAddr{} }

func main() {
	var last *verdict
	conns := make(listener)
	server := http.Server{
		ErrorLog: log.New(io.Discard, "", 0),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			last = &verdict{true, r.Method, r.RequestURI, r.Host, r.ProtoMinor, r.Header.Clone(), r.ContentLength, r.TransferEncoding}
			w.Header().Set("Connection", "close")
		}),
	}
	go server.Serve(conns)
	in, out := bufio.NewReader(os.Stdin), bufio.NewWriter(os.Stdout)
	defer out.Flush()
	encoder := json.NewEncoder(out)
	for {
		var length uint32
		if err := binary.Read(in, binary.BigEndian, &length); err == io.EOF {
			return
		} else if err != nil {
			log.Fatal(err)
		}
		c := &conn{came: make([]byte, length), closed: make(chan struct{})}
		if _, err := io.ReadFull(in, c.came); err != nil {
			log.Fatal(err)
		}
		last = &verdict{}
		conns <- c
		<-c.closed
		if err := encoder.Encode(last); err != nil {
			log.Fatal(err)
		}
	}
}
