// swarm runs many client-go clients against one address and says each second how they fare.
//
// Each client has a connection of its own, a reflector (list and watch of the configmaps of one namespace)
// and a small request every now and then; one of them changes an object every second, so that watches carry events.
//
// Output: one JSON object a line on stdout, each second and when asked. Input: "report", "reset" and "quit", one a line, on
// stdin. All counters but the clients' state count from the last reset; "mark" is the number of reports and resets so far.
// What is counted, exactly:
//
//   - errors: requests that failed in the transport (net/http's own HTTP/2 retries excluded, client-go's included)
//     or were answered with a status of 400 or more.
//   - relists: LISTs, and watches that ask for the initial events, after a client's first.
//   - watch_breaks: watch responses whose body ended in anything but a clean end of stream, and ERROR events in a watch.
//     A watch that ends cleanly is resumed by resourceVersion, whoever ended it: no break.
//   - missed, doubled: gaps and repetitions in the numbers that the writer puts into the object.
//
// With --life a client ends after about so long, as a pod does, and another one takes its place, with a connection and
// a first LIST of its own. With --short so many clients a second come besides, who make one request and go.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"k8s.io/client-go/rest"
)

type options struct {
	server, ca, namespace               string
	adminCert, adminKey                 string
	identities, clientCert, clientKey   string
	tokens                              string
	tokenShare                          float64
	clients, objects                    int
	period, writePeriod, requestTimeout time.Duration
	life                                time.Duration
	short                               float64
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "swarm:", err)
		os.Exit(1)
	}
}

func parseOptions() (options, error) {
	var o options
	flag.StringVar(&o.server, "server", "", "address of the apiservers' load balancer, https://HOST:PORT")
	flag.StringVar(&o.ca, "ca", "", "PEM file with the CA of the serving certificates")
	flag.StringVar(&o.namespace, "namespace", "swarm", "namespace of the configmaps; made when it does not exist")
	flag.StringVar(&o.adminCert, "admin-cert", "", "certificate that may make the namespace and the role binding")
	flag.StringVar(&o.adminKey, "admin-key", "", "its key")
	flag.StringVar(&o.identities, "identities", "", "directory with client-N.crt and client-N.key, one identity a client, N from 0")
	flag.StringVar(&o.clientCert, "client-cert", "", "certificate shared by all clients, in place of --identities")
	flag.StringVar(&o.clientKey, "client-key", "", "its key")
	flag.StringVar(&o.tokens, "tokens", "", "file with bearer tokens, one a line, for the clients that use one")
	flag.Float64Var(&o.tokenShare, "token-share", 0, "share of the clients that use a bearer token, 0 to 1")
	flag.IntVar(&o.clients, "clients", 300, "number of clients")
	flag.IntVar(&o.objects, "objects", 20, "configmaps in the namespace")
	flag.DurationVar(&o.period, "period", 2*time.Second, "mean time between two small requests of a client")
	flag.DurationVar(&o.writePeriod, "write-period", time.Second, "time between two changes of the object")
	flag.DurationVar(&o.requestTimeout, "request-timeout", 30*time.Second, "limit of a small request")
	flag.DurationVar(&o.life, "life", 0, "mean time a client lives until another one takes its place; 0: for ever")
	flag.Float64Var(&o.short, "short", 0, "clients a second that make one request and go")
	flag.Parse()
	switch {
	case o.server == "" || o.ca == "" || o.adminCert == "":
		return o, fmt.Errorf("--server, --ca and --admin-cert must be given")
	case o.identities == "" && o.clientCert == "":
		return o, fmt.Errorf("one of --identities and --client-cert must be given")
	case o.life < 0 || o.life > 0 && o.life < time.Second:
		return o, fmt.Errorf("--life must be 0, or 1s or more, is %v", o.life)
	case o.short < 0 || o.short > 100:
		return o, fmt.Errorf("--short must be from 0 to 100, is %v", o.short)
	case o.clients < 1:
		return o, fmt.Errorf("--clients must be 1 or more, is %d", o.clients)
	case o.tokenShare < 0 || o.tokenShare > 1:
		return o, fmt.Errorf("--token-share must be from 0 to 1, is %v", o.tokenShare)
	case o.tokenShare > 0 && o.tokens == "":
		return o, fmt.Errorf("--token-share needs --tokens")
	}
	if _, err := url.Parse(o.server); err != nil {
		return o, fmt.Errorf("--server: %w", err)
	}
	return o, nil
}

func run() error {
	o, err := parseOptions()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()

	admin := &rest.Config{
		Host:            o.server,
		UserAgent:       "swarm-setup",
		TLSClientConfig: rest.TLSClientConfig{CAFile: o.ca, CertFile: o.adminCert, KeyFile: o.adminKey},
	}
	if err := prepare(ctx, admin, o.namespace, o.objects); err != nil {
		return fmt.Errorf("setting up namespace %s: %w", o.namespace, err)
	}

	stats := newStats()
	clients, err := makeClients(o, stats)
	if err != nil {
		return err
	}
	start(ctx, clients, o)

	quit, asked := make(chan struct{}), make(chan struct{})
	go readCommands(stats, asked, quit)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	out := json.NewEncoder(os.Stdout)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-quit:
			return nil
		case <-tick.C:
		case <-asked:
		}
		line := stats.line()
		line.Clients = len(clients)
		for _, place := range clients {
			c := place.client.Load()
			if c.watching.Load() > 0 {
				line.Ready++
			}
			if port := c.newestPort(); port != 0 {
				line.Ports = append(line.Ports, port)
			}
		}
		if err := out.Encode(line); err != nil {
			return fmt.Errorf("writing to stdout: %w", err)
		}
	}
}

// makeClients reads identities and builds the clients, in parallel: each parses a key and a CA.
func makeClients(o options, stats *stats) ([]*place, error) {
	var tokens []string
	if o.tokens != "" {
		text, err := os.ReadFile(o.tokens)
		if err != nil {
			return nil, fmt.Errorf("--tokens: %w", err)
		}
		tokens = strings.Fields(string(text))
	}
	withToken := int(math.Round(o.tokenShare * float64(o.clients)))
	if withToken > len(tokens) {
		return nil, fmt.Errorf("--tokens %s holds %d tokens, %d clients need one", o.tokens, len(tokens), withToken)
	}
	ca, err := os.ReadFile(o.ca)
	if err != nil {
		return nil, fmt.Errorf("--ca: %w", err)
	}

	clients := make([]*place, o.clients)
	errs := make([]error, o.clients)
	var group sync.WaitGroup
	slots := make(chan struct{}, runtime.GOMAXPROCS(0))
	for i := range clients {
		group.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			config := &rest.Config{Host: o.server, UserAgent: fmt.Sprintf("swarm-client-%d", i), QPS: -1}
			config.TLSClientConfig.CAData = ca
			// Spread, so that every apiserver gets its part of the token clients.
			if withToken > 0 && i*withToken/o.clients != (i+1)*withToken/o.clients {
				config.BearerToken = tokens[i*withToken/o.clients]
			} else if o.identities != "" {
				config.TLSClientConfig.CertFile = filepath.Join(o.identities, fmt.Sprintf("client-%d.crt", i))
				config.TLSClientConfig.KeyFile = filepath.Join(o.identities, fmt.Sprintf("client-%d.key", i))
			} else {
				config.TLSClientConfig.CertFile, config.TLSClientConfig.KeyFile = o.clientCert, o.clientKey
			}
			clients[i], errs[i] = newPlace(config, o, stats)
		})
	}
	group.Wait()
	for i, err := range errs {
		if err != nil {
			return nil, fmt.Errorf("client %d: %w", i, err)
		}
	}
	return clients, nil
}

// place is where one client is after another, all of them with the same identity.
type place struct {
	config  *rest.Config
	options options
	stats   *stats
	client  atomic.Pointer[client]
}

func newPlace(config *rest.Config, o options, stats *stats) (*place, error) {
	p := &place{config: config, options: o, stats: stats}
	return p, p.renew()
}

func (p *place) renew() error {
	c, err := newClient(rest.CopyConfig(p.config), p.options, p.stats)
	if err == nil {
		p.client.Store(c)
	}
	return err
}

// run has one client after another live there; the first one begins after the delay.
func (p *place) run(ctx context.Context, delay time.Duration) {
	for ctx.Err() == nil {
		c := p.client.Load()
		life, end := context.WithCancel(ctx)
		if p.options.life > 0 {
			// Between half and one and a half lives. No deadline: a request that is given up has not failed.
			time.AfterFunc(delay+p.options.life/2+rand.N(p.options.life), end)
		}
		c.run(life, delay, p.options.period)
		end()
		c.end()
		if ctx.Err() == nil {
			if err := p.renew(); err != nil {
				p.stats.failed("the next client: %v", err)
				return
			}
		}
		delay = 0
	}
}

// start spreads the clients over one period, so that they do not speak in step.
func start(ctx context.Context, places []*place, o options) {
	for i, p := range places {
		delay := o.period * time.Duration(i) / time.Duration(len(places))
		go p.run(ctx, delay)
	}
	// The writer has a client of its own where clients end.
	writer := places[0].client.Load()
	if o.life > 0 {
		if own, err := newPlace(places[0].config, o, places[0].stats); err == nil {
			writer = own.client.Load()
		}
	}
	go writer.write(ctx, o.writePeriod)
	if o.short > 0 {
		go short(ctx, places, o)
	}
}

// short has clients come, make one request and go, as kubectl does.
func short(ctx context.Context, places []*place, o options) {
	for i := 0; sleep(ctx, time.Duration(float64(time.Second)/o.short)); i++ {
		p := places[i%len(places)]
		go func() {
			c, err := newClient(rest.CopyConfig(p.config), o, p.stats)
			if err != nil {
				p.stats.failed("a short client: %v", err)
				return
			}
			c.get(ctx)
			c.end()
		}()
	}
}

func readCommands(stats *stats, asked, quit chan struct{}) {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		switch command := strings.TrimSpace(lines.Text()); command {
		case "report":
			stats.mark()
			asked <- struct{}{}
		case "reset":
			stats.reset()
		case "quit":
			close(quit)
			return
		case "":
		default:
			fmt.Fprintf(os.Stderr, "swarm: unknown command %q: report, reset and quit are known\n", command)
		}
	}
}
