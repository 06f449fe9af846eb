package attach

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// Command is what a request asks for.
type Command string

// The commands, named after the CNI operations they come from.
const (
	Add    Command = "add"    // wait until the pod may start
	Tell   Command = "tell"   // the pod starts, whatever the agent says
	Del    Command = "del"    // forget the attachment
	Check  Command = "check"  // is the pod captured as it should be?
	Status Command = "status" // would the agent answer an Add?
	GC     Command = "gc"     // forget all attachments of a network but those named
)

// Request is what the plugin sends.
type Request struct {
	Command    Command    `json:"command"`
	Attachment Attachment `json:"attachment"`
	// Deadline is when the plugin gives up. An agent that hung until then must not
	// take over what its runtime has undone since.
	Deadline time.Time `json:"deadline,omitzero"`
	Valid    []string  `json:"valid,omitempty"` // GC: container ids that exist
}

// Answer is what the agent says.
type Answer struct {
	InMesh  bool     `json:"inMesh,omitempty"` // Add, Check: the pod is redirected
	Why     string   `json:"why,omitempty"`    // what decided InMesh
	Refusal *Refusal `json:"refusal,omitempty"`
}

// Refusal is the agent's word that it could not do what it was asked.
type Refusal struct {
	Message string `json:"message"`           // which pod, and what is missing
	Details string `json:"details,omitempty"` // what to do about it
	// Unready: the agent knows no more about the pod than the facts on the disk do.
	Unready bool `json:"unready,omitempty"`
	// Final: asking again changes nothing, as the request itself is wrong.
	Final bool `json:"final,omitempty"`
}

func (r *Refusal) Error() string {
	if r.Details == "" {
		return r.Message
	}
	return r.Message + ": " + r.Details
}

// maxFrame bounds a message. The largest is a GC's list: 1000 container ids of 64
// characters.
const maxFrame = 128 << 10

// ErrProtocol reports a peer that sends something else than a message.
var ErrProtocol = errors.New("not a message of the CNI socket")

func write(w io.Writer, message any) error {
	data, err := json.Marshal(message)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if len(data) > maxFrame {
		return fmt.Errorf("encode message: %d bytes are more than %d", len(data), maxFrame)
	}
	// One write, so that a peer never waits for half a message.
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(data))), data...))
	return err
}

func read(r io.Reader, message any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxFrame {
		return fmt.Errorf("%w: %d bytes announced, at most %d are allowed", ErrProtocol, n, maxFrame)
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(r, data); err != nil {
		return err
	}
	if err := json.Unmarshal(data, message); err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return nil
}
