package record

import (
	"errors"
	"fmt"
)

// Alert is a TLS alert description (https://www.rfc-editor.org/rfc/rfc8446#section-6).
type Alert uint8

const (
	CloseNotify       Alert = 0
	UnexpectedMessage Alert = 10
	BadRecordMAC      Alert = 20
	RecordOverflow    Alert = 22
	IllegalParameter  Alert = 47
	DecodeError       Alert = 50
	InternalError     Alert = 80
	UserCanceled      Alert = 90
)

var alertNames = map[Alert]string{
	CloseNotify: "close notify", UnexpectedMessage: "unexpected message", BadRecordMAC: "bad record MAC",
	RecordOverflow: "record overflow", IllegalParameter: "illegal parameter", DecodeError: "decode error",
	InternalError: "internal error", UserCanceled: "user canceled",
}

func (a Alert) String() string {
	if name, ok := alertNames[a]; ok {
		return name
	}
	return fmt.Sprintf("alert %d", uint8(a))
}

// Error ends a connection: what we found wrong with the peer's records, or the alert that the peer sent.
type Error struct {
	Alert  Alert
	Remote bool // the peer sent it
	Reason string
}

func (e *Error) Error() string {
	switch {
	case e.Remote:
		return "tls: peer sent alert: " + e.Alert.String()
	case e.Reason != "":
		return "tls: " + e.Alert.String() + ": " + e.Reason
	}
	return "tls: " + e.Alert.String()
}

// ErrClosed is returned by a Sealer after its closing alert.
var ErrClosed = errors.New("tls: records after the closing alert")

func fault(a Alert, reason string) error { return &Error{Alert: a, Reason: reason} }
