// Kubelet serves what kube-apiserver asks of a node's kubelet for logs, exec and port-forward, over TLS, by the streaming
// library that container runtimes use (k8s.io/cri-streaming). The one container there is is a directory of this machine:
// commands run in it as they are, and ports are this machine's own.
//
// It runs whatever it is told by a holder of a certificate, and so must listen only where a test alone can reach it.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

// idle is as long as the kubelet's default for streams (--streaming-connection-idle-timeout).
const idle = 4 * time.Hour

const creation = 30 * time.Second

type node struct{ root string }

// ExecInContainer runs a command in the directory. There is no terminal: nobody here asks for one.
func (n node) ExecInContainer(ctx context.Context, _, _, _ string, words []string, in io.Reader, out, errs io.WriteCloser, tty bool, _ <-chan remotecommand.TerminalSize, _ time.Duration) error {
	if tty {
		return errors.New("there are no terminals here")
	}
	command := exec.CommandContext(ctx, words[0], words[1:]...)
	command.Dir = n.root
	if out != nil {
		command.Stdout = out
	}
	if errs != nil {
		command.Stderr = errs
	}
	if in != nil {
		// By a pipe of its own: Wait would wait for an `in` that never ends, although the command has.
		pipe, err := command.StdinPipe()
		if err != nil {
			return err
		}
		go func() {
			io.Copy(pipe, in)
			pipe.Close()
		}()
	}
	err := command.Run()
	var exited *exec.ExitError
	if errors.As(err, &exited) && exited.Exited() {
		return utilexec.CodeExitError{Err: err, Code: exited.ExitCode()}
	}
	return err
}

// PortForward joins a stream to a port of this machine.
func (n node) PortForward(_ context.Context, _, _ string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	socket, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return err
	}
	defer socket.Close()
	go func() {
		io.Copy(socket, stream)
		socket.(*net.TCPConn).CloseWrite()
	}()
	_, err = io.Copy(stream, socket)
	return err
}

// logs sends the lines of a growing file, until it ends with "end" or the client goes.
func (n node) logs(w http.ResponseWriter, r *http.Request) {
	file, err := os.Open(n.root + "/log")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer file.Close()
	last := ""
	piece := make([]byte, 32<<10)
	for r.Context().Err() == nil {
		count, err := file.Read(piece)
		if count > 0 {
			if _, err := w.Write(piece[:count]); err != nil {
				return
			}
			w.(http.Flusher).Flush()
			last += string(piece[:count])
			last = last[max(0, len(last)-len("\nend\n")):]
			continue
		}
		if err != io.EOF || r.URL.Query().Get("follow") == "" || strings.HasSuffix(last, "\nend\n") {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (n node) exec(w http.ResponseWriter, r *http.Request) {
	options, err := remotecommand.NewOptions(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	// What container runtimes offer.
	protocols := remotecommand.SupportedStreamingProtocols
	remotecommand.ServeExec(w, r, n, r.PathValue("pod"), "", r.PathValue("container"), r.URL.Query()["command"], options, idle, creation, protocols)
}

func (n node) forward(w http.ResponseWriter, r *http.Request) {
	options, err := portforward.NewV4Options(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	portforward.ServePortForward(w, r, n, r.PathValue("pod"), "", options, idle, creation, portforward.SupportedProtocols)
}

func main() {
	listen := flag.String("listen", "", "address of the TLS port")
	certificate := flag.String("cert", "", "serving certificate (PEM)")
	key := flag.String("key", "", "its key (PEM)")
	authority := flag.String("client-ca", "", "who vouches for clients (PEM)")
	root := flag.String("root", "", "the container: a directory with a file `log`")
	flag.Parse()
	text, err := os.ReadFile(*authority)
	if err != nil {
		log.Fatal(err)
	}
	clients := x509.NewCertPool()
	clients.AppendCertsFromPEM(text)

	n := node{*root}
	api := http.NewServeMux()
	api.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", n.logs)
	api.HandleFunc("/exec/{namespace}/{pod}/{container}", n.exec)
	api.HandleFunc("/portForward/{namespace}/{pod}", n.forward)
	server := http.Server{
		Addr:    *listen,
		Handler: api,
		TLSConfig: &tls.Config{
			ClientAuth: tls.RequireAndVerifyClientCert,
			ClientCAs:  clients,
			// As the kubelet's own server: streams are HTTP/1.1 upgrades.
			NextProtos: []string{"http/1.1"},
		},
	}
	log.Fatal(server.ListenAndServeTLS(*certificate, *key))
}
