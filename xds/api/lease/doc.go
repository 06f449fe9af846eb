// Package lease is the messages by which the node proxy has connections of its pods go without it (generated).
package lease
