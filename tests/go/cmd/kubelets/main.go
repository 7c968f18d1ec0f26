// kubelets runs many light kubelets: clients that ask an apiserver what a hollow kubelet asks it, with a connection and a
// certificate (system:node:NAME) of their own, and how long each request took.
//
// They are in groups, each with a server of its own, so that the same minutes are measured for all.
//
// Output: one JSON object a line on stdout, each second, with the counters of each group since the start. Input, one a
// line, on stdin: "measure" forgets all times of requests, "mark" begins another part of them, "figures" prints those of all
// and of who began after the mark as one more line, "quit" ends.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// group is some kubelets that go to one server.
type group struct {
	name, server string
	kubelets     int
	figures      *figures
}

// groups reads NAME=HOST:PORT=COUNT.
type groups []*group

func (g *groups) String() string { return fmt.Sprint(len(*g), " groups") }

func (g *groups) Set(text string) error {
	parts := strings.Split(text, "=")
	if len(parts) != 3 {
		return fmt.Errorf("must be NAME=HOST:PORT=COUNT")
	}
	count, err := strconv.Atoi(parts[2])
	if err != nil || count < 1 {
		return fmt.Errorf("the count %q must be a number from 1 on", parts[2])
	}
	for _, other := range *g {
		if other.name == parts[0] {
			return fmt.Errorf("two groups are called %s", other.name)
		}
	}
	*g = append(*g, &group{name: parts[0], server: "https://" + parts[1], kubelets: count, figures: newFigures()})
	return nil
}

type options struct {
	groups groups
	pki    string
	ramp   time.Duration
	lease  time.Duration
	status time.Duration
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "kubelets:", err)
		os.Exit(1)
	}
}

func run() error {
	var o options
	flag.Var(&o.groups, "group", "NAME=HOST:PORT=COUNT: so many kubelets go there; may be given several times")
	flag.StringVar(&o.pki, "pki", "", "directory with ca.crt and ca.key, which signs the kubelets' certificates")
	flag.DurationVar(&o.ramp, "ramp", 30*time.Second, "time within which all of them come")
	flag.DurationVar(&o.lease, "lease", 10*time.Second, "time between two renewals of a Lease (nodeLeaseDurationSeconds / 4)")
	flag.DurationVar(&o.status, "status", 5*time.Minute, "time between two reports of status (nodeStatusReportFrequency)")
	flag.Parse()
	if len(o.groups) == 0 || o.pki == "" {
		return fmt.Errorf("--group and --pki must be given")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	authority, err := readAuthority(filepath.Join(o.pki, "ca.crt"), filepath.Join(o.pki, "ca.key"))
	if err != nil {
		return err
	}
	if err := start(ctx, o, authority); err != nil {
		return err
	}
	out := &output{encoder: json.NewEncoder(os.Stdout)}
	quit := make(chan struct{})
	go readCommands(o.groups, out, quit)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-quit:
			return nil
		case <-tick.C:
			counters := map[string]counters{}
			for _, g := range o.groups {
				counters[g.name] = g.figures.counters()
			}
			out.line(map[string]any{"counters": counters})
		}
	}
}

// start makes all kubelets, and lets them come one after the other, of all groups in turn.
func start(ctx context.Context, o options, authority *authority) error {
	var all []*kubelet
	for index := 0; ; index++ {
		before := len(all)
		for _, g := range o.groups {
			if index < g.kubelets {
				k, err := newKubelet(fmt.Sprintf("hollow-%s-%04d", g.name, index), g, authority)
				if err != nil {
					return err
				}
				all = append(all, k)
			}
		}
		if len(all) == before {
			break
		}
	}
	go func() {
		for _, k := range all {
			go k.run(ctx, o)
			if !sleep(ctx, o.ramp/time.Duration(len(all))) {
				return
			}
		}
	}()
	return nil
}

// output is stdout, a line at a time.
type output struct {
	mutex   sync.Mutex
	encoder *json.Encoder
}

func (o *output) line(value any) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	if err := o.encoder.Encode(value); err != nil {
		os.Exit(1)
	}
}

func readCommands(all groups, out *output, quit chan<- struct{}) {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		switch lines.Text() {
		case "measure":
			for _, g := range all {
				g.figures.forget()
			}
		case "mark":
			now := time.Now()
			for _, g := range all {
				g.figures.note(now)
			}
		case "figures":
			whole, after := map[string]times{}, map[string]times{}
			for _, g := range all {
				whole[g.name], after[g.name] = g.figures.all(), g.figures.sinceMark()
			}
			out.line(map[string]any{"times": whole, "times_after": after})
		case "quit":
			close(quit)
			return
		default:
			fmt.Fprintf(os.Stderr, "kubelets: %q is no command\n", lines.Text())
		}
	}
	close(quit)
}

func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
