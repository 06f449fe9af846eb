// Package zds is the messages by which the node agent hands network namespaces to the node proxy (generated).
package zds
